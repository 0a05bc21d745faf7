// SPDX-License-Identifier: MIT
/// \file
/// A picture as the text of an SVG file.
#pragma once

#include <iomanip>
#include <ios>
#include <set>
#include <sstream>
#include <string>
#include <string_view>

namespace weir::bench {

/// `value` with so many digits behind the point.
inline std::string fixed(double value, int digits) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(digits) << value;
  return text.str();
}

/// As short as it is exact: 0.25, 8.
inline std::string decimal(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

/// Draws from back to front. Lengths are in pixels, y runs downwards; text stands on its y.
class Svg {
 public:
  enum class Anchor { kStart, kMiddle, kEnd };

  struct Font {
    double size = 12.0;
    std::string_view colour = "#1f2328";
    bool bold = false;
    Anchor anchor = Anchor::kStart;
    bool halo = false;  ///< White around the letters, where lines cross them.
  };

  struct Fill {
    std::string_view colour;
    bool striped = false;
  };

  void rectangle(double x, double y, double width, double height, double radius, const Fill& fill) {
    open_rectangle(x, y, width, height, radius, fill);
    body_ << "/>\n";
  }

  /// A rectangle that says what it stands for when pointed at.
  void bar(double x, double y, double width, double height, const Fill& fill,
           std::string_view meaning) {
    open_rectangle(x, y, width, height, 2.0, fill);
    body_ << " class=\"bar\"><title>" << escaped(meaning) << "</title></rect>\n";
  }

  void vertical(double x, double from, double to, std::string_view colour) {
    body_ << "<line x1=\"" << fixed(x, 1) << "\" x2=\"" << fixed(x, 1) << "\" y1=\""
          << fixed(from, 1) << "\" y2=\"" << fixed(to, 1) << "\" stroke=\"" << colour << "\"/>\n";
  }

  void text(double x, double y, std::string_view content, const Font& font) {
    constexpr std::string_view kAnchors[] = {"start", "middle", "end"};
    body_ << "<text x=\"" << fixed(x, 1) << "\" y=\"" << fixed(y, 1) << "\" font-size=\""
          << fixed(font.size, 1) << "\" fill=\"" << font.colour << '"'
          << (font.bold ? " font-weight=\"600\"" : "")
          << (font.halo ? " paint-order=\"stroke\" stroke=\"#ffffff\" stroke-width=\"3\"" : "")
          << " text-anchor=\"" << kAnchors[static_cast<std::size_t>(font.anchor)] << "\">"
          << escaped(content) << "</text>\n";
  }

  /// The whole file, of a picture described by `title` for those who cannot see it.
  std::string str(double width, double height, std::string_view title) const {
    std::ostringstream file;
    file << "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" << fixed(width, 0)
         << "\" height=\"" << fixed(height, 0) << "\" viewBox=\"0 0 " << fixed(width, 0) << ' '
         << fixed(height, 0) << "\" role=\"img\" font-family=\"-apple-system, 'Segoe UI', "
         << "'Noto Sans', 'DejaVu Sans', Helvetica, Arial, sans-serif\">\n<title>" << escaped(title)
         << "</title>\n"
         << "<defs>\n"
         << definitions_.str()
         << "</defs>\n"
         // White, so that it can be read where the page is dark.
         << "<rect width=\"100%\" height=\"100%\" rx=\"12\" fill=\"#ffffff\"/>\n"
         << body_.str() << "</svg>\n";
    return file.str();
  }

  static std::string escaped(std::string_view text) {
    std::string out;
    for (const char c : text) {
      switch (c) {
        case '&':
          out += "&amp;";
          break;
        case '<':
          out += "&lt;";
          break;
        case '>':
          out += "&gt;";
          break;
        case '"':
          out += "&quot;";
          break;
        default:
          out += c;
      }
    }
    return out;
  }

 private:
  void open_rectangle(double x, double y, double width, double height, double radius,
                      const Fill& fill) {
    body_ << "<rect x=\"" << fixed(x, 1) << "\" y=\"" << fixed(y, 1) << "\" width=\""
          << fixed(width, 1) << "\" height=\"" << fixed(height, 1) << "\" rx=\"" << fixed(radius, 1)
          << "\" fill=\""
          << (fill.striped ? "url(#" + stripes(fill.colour) + ")" : std::string(fill.colour))
          << '"';
  }

  /// The name of the pattern of stripes in `colour`, defined at first use.
  std::string stripes(std::string_view colour) {
    const std::string name = "stripes-" + std::string(colour.substr(1));
    if (patterns_.insert(name).second) {
      const auto stripe = [&](std::string_view width, std::string_view stripe_colour,
                              std::string_view opacity) {
        definitions_ << "<rect width=\"" << width << "\" height=\"5\" fill=\"" << stripe_colour
                     << "\" fill-opacity=\"" << opacity << "\"/>";
      };
      definitions_ << "<pattern id=\"" << name << "\" width=\"5\" height=\"5\" "
                   << "patternUnits=\"userSpaceOnUse\" patternTransform=\"rotate(45)\">";
      stripe("5", "#ffffff", "1");
      stripe("5", colour, "0.55");
      stripe("2.5", colour, "1");
      definitions_ << "</pattern>\n";
    }
    return name;
  }

  std::set<std::string> patterns_;
  std::ostringstream definitions_;
  std::ostringstream body_;
};

}  // namespace weir::bench
