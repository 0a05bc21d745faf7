// SPDX-License-Identifier: MIT
/// \file
/// How the page of a report looks.
#pragma once

/// The style sheet: light and dark, from the width of a telephone on, and on paper.
inline constexpr const char* kReportStyle = R"css(
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1b2129;--soft:#5b6675;--line:#dde2e9;
--accent:#1f5fbf;--more:#1f5fbf;--less:#c2620c;--ring:#1f5fbf;--tl:.89;--tc:.085;--sl:.62;--sc:.15;
--bad-ink:#8a2b0b;--bad:#fdeee6;--good:#e9f4ec;--good-ink:#1d5c34}
:root[data-theme=dark]{color-scheme:dark;--page:#11151a;--card:#191f26;--ink:#e6eaf0;--soft:#9ba7b6;
--line:#2c3540;--accent:#7fb0ff;--more:#6aa4ff;--less:#f09a4a;--ring:#8fbaff;--tl:.40;--tc:.085;--sl:.72;
--sc:.14;--bad-ink:#ffb899;--bad:#3a2017;--good:#17301f;--good-ink:#9bdcb0}
:root[data-theme=light]{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",sans-serif;-webkit-text-size-adjust:100%}
.wrap{max-width:1240px;margin:0 auto;padding:0 16px}
header.top{padding:28px 0 8px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 6px;letter-spacing:-.015em}
h2{font-size:1.15rem;line-height:1.3;margin:0 0 6px;letter-spacing:-.005em}
h3{font-size:.95rem;margin:16px 0 6px}
p{margin:0 0 10px;max-width:72ch}
.soft{color:var(--soft)}.small{font-size:.875rem}
a{color:var(--accent)}
.skip{position:absolute;left:-9999px}.skip:focus{left:16px;top:8px;background:var(--card);padding:6px 10px;z-index:9}
.facts{display:flex;flex-wrap:wrap;gap:8px 28px;margin:14px 0 4px;padding:0}
.facts div{min-width:0}.facts dt{color:var(--soft);font-size:.8rem}.facts dd{margin:0;font-weight:600;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.bar{position:sticky;top:0;z-index:5;background:var(--page);border-bottom:1px solid var(--line);padding:8px 0;margin-top:10px}
.bar .wrap{display:flex;flex-wrap:wrap;align-items:center;gap:6px 14px}
.bar label{display:flex;align-items:center;gap:8px;font-size:.9rem}
.bar input[type=range]{width:150px;accent-color:var(--accent)}
.bar output{font-variant-numeric:tabular-nums;color:var(--soft)}
.bar .push{margin-left:auto}
button,select,input[type=search]{font:inherit;font-size:.9rem;color:var(--ink);background:var(--card);
border:1px solid var(--line);border-radius:8px;padding:5px 10px;min-height:34px}
button{cursor:pointer}button:hover,select:hover{border-color:var(--soft)}
button[aria-pressed=true]{border-color:var(--accent);box-shadow:inset 0 0 0 1px var(--accent)}
:focus-visible{outline:2px solid var(--ring);outline-offset:2px;border-radius:4px}
main{display:grid;grid-template-columns:minmax(0,1fr);gap:16px;padding:16px 0 40px}
.columns{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
.columns>div{display:grid;gap:16px;align-content:start;min-width:0}
section.card{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:18px 20px 16px;min-width:0}
.card>p.soft{font-size:.9rem;margin-bottom:12px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:14px 24px}
figure{margin:0 0 4px;min-width:0}figure figcaption{font-size:.85rem;font-weight:600;margin-bottom:6px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font:11px system-ui,sans-serif;font-variant-numeric:tabular-nums}
svg .axis{stroke:var(--line);stroke-width:1}
svg .chance{stroke:var(--soft);stroke-dasharray:3 4;fill:none;stroke-width:1.3}
svg .series{fill:none;stroke-width:2;stroke-linejoin:round}
svg .band{opacity:.16;stroke:none}
svg .guide{stroke:var(--soft);stroke-width:1;visibility:hidden}
svg .cell{stroke:var(--card);stroke-width:.6}
svg .cell.zero{fill:var(--line);fill-opacity:.28}
svg .more{fill:var(--more)}svg .less{fill:var(--less)}svg .base{fill:var(--line);fill-opacity:.25}
svg .unsure{fill:var(--soft);pointer-events:none}
svg .cursor{fill:none;stroke:var(--ink);stroke-width:2;visibility:hidden}
svg .link{fill:none;stroke-opacity:.34}svg .flow-on .link{stroke-opacity:.05}svg .flow-on .link.on{stroke-opacity:.75}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
.key{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:.8rem;color:var(--soft);margin:6px 0 0;padding:0;list-style:none}
.key i{display:inline-block;width:16px;height:0;border-top:3px solid;vertical-align:middle;margin-right:6px}
.key i.dash{border-top:2px dashed var(--soft)}
.ramp{display:inline-block;width:140px;height:10px;border-radius:3px;vertical-align:middle;margin:0 8px;
background:linear-gradient(90deg,var(--less),color-mix(in srgb,var(--line) 25%,transparent),var(--more))}
details{margin-top:8px;font-size:.85rem}summary{cursor:pointer;color:var(--soft);padding:2px 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.82rem}
th,td{padding:3px 9px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}thead th{color:var(--soft);font-weight:600}
.tokens{font:14px/1.85 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;max-height:470px;overflow:auto;
border:1px solid var(--line);border-radius:10px;padding:10px 12px;white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4}
.tokens span{padding:2px 0;border-radius:3px;cursor:default;background:oklch(var(--tl) var(--tc) var(--h));position:relative}
.tokens span.off{background:none;color:var(--soft)}
.tokens span.hit{outline:2px solid var(--ink);outline-offset:0}
.tokens span.lost{text-decoration:line-through dotted}
.tokens span.esc{font-size:.72em;opacity:.75}
.tokens span.new{color:var(--soft)}
.tokens span:focus,.tokens span.at{outline:2px solid var(--ring);outline-offset:1px;z-index:1}
.tokens hr{border:0;border-top:1px dashed var(--line);margin:8px 0}
.tools{display:flex;flex-wrap:wrap;gap:8px;margin:4px 0 10px;align-items:center}
.tools label{font-size:.85rem;color:var(--soft);display:flex;gap:6px;align-items:center}
.tools input[type=search]{width:190px;max-width:60vw}
.read{display:grid;grid-template-columns:minmax(0,1fr) 290px;gap:16px}
.detail{font-size:.88rem;border-left:3px solid var(--line);padding:2px 0 2px 14px;align-self:start;position:sticky;top:64px;min-height:150px}
.detail b{font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:1.05rem;overflow-wrap:anywhere}
.meter{display:grid;grid-template-columns:74px 1fr 48px;gap:8px;align-items:center;margin:4px 0;font-variant-numeric:tabular-nums}
.meter i{display:block;height:10px;border-radius:3px;background:oklch(var(--sl) var(--sc) var(--h))}
.chips{display:flex;flex-wrap:wrap;gap:4px;margin:8px 0 0}
.chips button{min-height:28px;padding:1px 8px;font-size:.78rem;border-radius:6px;font-variant-numeric:tabular-nums;
background:oklch(var(--tl) var(--tc) var(--h));border-color:transparent}
.chips button[aria-pressed=true]{border-color:var(--ink);box-shadow:none}
.tops{display:grid;grid-template-columns:repeat(auto-fill,minmax(215px,1fr));gap:10px}
.tops div.expert{border:1px solid var(--line);border-left:5px solid oklch(var(--sl) var(--sc) var(--h));border-radius:8px;padding:7px 10px;font-size:.83rem}
.tops .expert h3{margin:0 0 4px;font-size:.85rem}
.tops code{font:12.5px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;background:var(--page);border:1px solid var(--line);border-radius:4px;
padding:0 4px;margin:0 4px 4px 0;display:inline-block;white-space:pre}
.tops code small{color:var(--soft);font-size:.8em;margin-left:4px}
.says{margin:10px 0 0;padding:0;list-style:none;display:grid;gap:6px}
.says li{padding:7px 12px;border-radius:8px;background:var(--page);max-width:none}
.says li.bad{background:var(--bad);color:var(--bad-ink)}.says li.good{background:var(--good);color:var(--good-ink)}
#tip{position:fixed;pointer-events:none;z-index:20;background:var(--ink);color:var(--card);font-size:.82rem;line-height:1.4;padding:6px 10px;
border-radius:8px;max-width:280px;white-space:pre-line;visibility:hidden;font-variant-numeric:tabular-nums}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
footer{color:var(--soft);font-size:.85rem;padding:0 0 40px}
@media(max-width:820px){.columns{grid-template-columns:minmax(0,1fr)}.read{grid-template-columns:minmax(0,1fr)}
.detail{position:static;border-left:0;border-top:3px solid var(--line);padding:10px 0 0;min-height:132px}
section.card{padding:14px 14px 12px;border-radius:12px}h1{font-size:1.4rem}.wrap{padding:0 12px}.tokens{max-height:360px}
.bar .push{margin-left:0}.bar input[type=range]{width:110px}}
@media(prefers-reduced-motion:no-preference){html{scroll-behavior:smooth}}
@media print{:root,:root[data-theme=dark]{--page:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#ccc;--tl:.89;--sl:.62;--more:#1f5fbf;--less:#c2620c}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}.bar,.tools,.skip,.chips,#tip{display:none!important}
main,.columns,.columns>div{display:block}section.card{break-inside:avoid;margin-bottom:12px}.tokens{max-height:none}section.text{break-inside:auto}
.read{display:block}.detail{display:none}}
)css";
