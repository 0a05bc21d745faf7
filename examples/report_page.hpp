// SPDX-License-Identifier: MIT
/// \file
/// The page of a report: one file of HTML that needs nothing else.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "report_figures.hpp"
#include "report_sections.hpp"
#include "report_style.hpp"

namespace report {

/// `text` where HTML stands.
inline std::string html(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    switch (c) {
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '&':
        escaped += "&amp;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      default:
        escaped += c;
    }
  }
  return escaped;
}

/// `data` as it may stand in a script element: nothing in it can end the element.
inline std::string in_script(const nlohmann::json& data) {
  const std::string text = data.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  std::string escaped;
  escaped.reserve(text.size());
  for (const char c : text) {
    if (c == '<') {
      escaped += "\\u003c";
    } else {
      escaped += c;
    }
  }
  return escaped;
}

/// The page of `data`: "title", "facts" as [name, value] pairs, and what the script draws. While
/// `reload_seconds` is above 0, the page loads itself anew that often.
inline std::string page(const nlohmann::json& data, int reload_seconds = 0) {
  const std::string title = html(data.at("title").get<std::string>());
  std::string text =
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n"
      "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; "
      "style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">\n"
      "<link rel=\"icon\" href=\"data:,\">\n";
  if (reload_seconds > 0) {
    text += "<meta http-equiv=\"refresh\" content=\"" + std::to_string(reload_seconds) + "\">\n";
  }
  text += "<title>" + title + "</title>\n<style>" + kReportStyle + "</style>\n</head>\n<body>\n" +
          "<a class=\"skip\" href=\"#main\">To the figures</a>\n" +
          "<header class=\"top\"><div class=\"wrap\"><h1>" + title + "</h1>\n";
  if (data.contains("intro")) {
    text += "<p class=\"soft\">" + html(data["intro"].get<std::string>()) + "</p>\n";
  }
  text += "<dl class=\"facts\">";
  for (const auto& fact : data.at("facts")) {
    text += "<div><dt>" + html(fact[0].get<std::string>()) + "</dt><dd>" +
            html(fact[1].get<std::string>()) + "</dd></div>";
  }
  text +=
      "</dl></div></header>\n"
      "<div class=\"bar\"><div class=\"wrap\">"
      "<label>Layer <input id=\"layer\" type=\"range\" min=\"0\" max=\"0\" value=\"0\">"
      "<output id=\"layer-name\" for=\"layer\"></output></label>"
      "<span class=\"push\" role=\"group\" aria-label=\"Colours\">"
      "<button type=\"button\" data-set=\"auto\">Auto</button> "
      "<button type=\"button\" data-set=\"light\">Light</button> "
      "<button type=\"button\" data-set=\"dark\">Dark</button></span></div></div>\n"
      "<div class=\"wrap\"><main id=\"main\"></main>\n"
      "<footer>Shaded bands are 95 % intervals by bootstrap over sequences; &ldquo;by "
      "chance&rdquo; "
      "is what experts chosen at random would give. Made by weir.</footer></div>\n"
      "<div id=\"tip\" aria-hidden=\"true\"></div><div id=\"say\" class=\"hidden\" "
      "aria-live=\"polite\"></div>\n"
      "<noscript><p class=\"wrap\">The figures of this page are drawn by a script that stands in "
      "it; the files beside this page have the same numbers.</p></noscript>\n"
      "<script type=\"application/json\" id=\"data\">" +
      in_script(data) + "</script>\n<script>" + kReportFigures + kReportSections +
      "</script>\n</body>\n</html>\n";
  return text;
}

}  // namespace report
