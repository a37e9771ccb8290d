"""The style sheet of every page: screen, dark mode and paper."""

from jaxcl.reporting.style import SERIES

_DARK_SERIES = ("#5ab0ea", "#ff8a4c", "#3fcf9f", "#e7a3cb", "#f2b94b", "#8fd0f5", "#a897d6")

_CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --surface: #ffffff; --ink: #1b1f24; --muted: #5c6570; --grid: #d9dee4; --faint: #bcc5cf;
  --line: #e3e7ec;
  --heat: #08519c; --on-heat: #ffffff; --good: #00714f; --bad: #b3400a; --good-wash: #e5f4ee; --bad-wash: #fcece3;
  --font: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Noto Sans",
    sans-serif;
  --mono: ui-monospace, "SF Mono", SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  LIGHT
}
@media (prefers-color-scheme: dark) { :root {
  --page: #101418; --surface: #171c22; --ink: #e6eaef; --muted: #9aa5b1; --grid: #2b333c; --faint: #4a5561;
  --line: #28303a;
  --heat: #5ab0ea; --on-heat: #08131d; --good: #56d3a4; --bad: #ff9a62; --good-wash: #12302a; --bad-wash: #38231a;
  DARK
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 var(--font); }
main { max-width: 1080px; margin: 0 auto; padding: 48px 28px 72px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; margin: 4px 0 10px; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 28px 0 6px; }
h3 .muted { font-weight: 400; margin-left: 6px; }
h2 + h3, .note + h3 { margin-top: 14px; }
table + h3, figure + .scroll { margin-top: 20px; }
p { margin: 0 0 12px; max-width: 76ch; }
a { color: var(--series-0); }
.eyebrow { color: var(--muted); font-size: 13px; letter-spacing: 0.04em; text-transform: uppercase; margin: 0; }
.path { color: var(--ink); font-size: 16px; overflow-wrap: anywhere; max-width: none; }
.path .to { color: var(--muted); padding: 0 3px; }
.facts { color: var(--muted); display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 14px; }
.muted, .note { color: var(--muted); }
.note { font-size: 13.5px; margin: 0 0 14px; }
.warn { background: var(--bad-wash); color: var(--bad); border-radius: 8px; padding: 8px 14px; margin: 14px 0;
  max-width: none; }
section { background: var(--surface); border: 1px solid var(--line); border-radius: 12px; padding: 24px 28px;
  margin-top: 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 14px; margin-top: 28px; }
.card { background: var(--surface); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px 14px; }
.card b { display: block; font-size: 13px; font-weight: 600; color: var(--muted); }
.card .value { font-size: 32px; font-weight: 650; letter-spacing: -0.02em; line-height: 1.25; font-variant-numeric:
  tabular-nums; }
.card .value small { font-size: 17px; font-weight: 500; color: var(--muted); margin-left: 2px; }
.card span { display: block; font-size: 13px; line-height: 1.4; color: var(--muted); }
.scroll { overflow-x: auto; margin: 0 -6px; padding: 0 6px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: left; vertical-align: top; }
thead th { color: var(--muted); font-size: 13px; font-weight: 600; border-bottom: 1px solid var(--line);
  vertical-align: bottom; }
tbody tr + tr td, tbody tr + tr th { border-top: 1px solid var(--line); }
td.number, th.number { text-align: right; white-space: nowrap; }
td.long { overflow-wrap: anywhere; max-width: 360px; }
tr.best td.mark, td.best { font-weight: 650; }
table.heat { border-collapse: separate; border-spacing: 3px; }
table.heat tbody tr + tr td, table.heat tbody tr + tr th { border-top: 0; }
table.heat thead th { border-bottom: 0; text-align: center; padding: 4px; font-weight: 500; }
table.heat thead th .name { display: block; max-width: 110px; margin: 0 auto; overflow: hidden; text-overflow:
  ellipsis; white-space: nowrap; }
table.heat.many thead th .name { writing-mode: vertical-rl; transform: rotate(180deg); max-width: none; max-height:
  120px; }
table.heat tbody th, table.heat tfoot th { font-weight: 500; color: var(--muted); white-space: nowrap; padding: 4px
  10px 4px 0;
    max-width: 230px; overflow: hidden; text-overflow: ellipsis; position: sticky; left: 0; background:
    var(--surface); vertical-align: middle; }
table.heat td { text-align: center; min-width: 72px; height: 40px; padding: 2px 6px; border-radius: 6px;
  vertical-align: middle; }
table.heat.few td { min-width: 112px; height: 46px; font-size: 15px; }
table.heat.many td { min-width: 45px; height: 32px; font-size: 13px; padding: 2px; }
table.heat.many tbody th { max-width: 190px; }
table.heat.many { border-spacing: 2px; }
table.heat td.cell { background: color-mix(in oklab, var(--heat) var(--share), var(--surface)); }
table.heat td.cell.deep { color: var(--on-heat); }
table.heat td.learned { box-shadow: inset 0 0 0 2px var(--ink); font-weight: 650; }
table.heat td.future { font-style: italic; }
table.heat td.none { color: var(--grid); }
table.heat tfoot td { height: 30px; font-size: 13px; }
.good { color: var(--good); } .bad { color: var(--bad); }
figure { margin: 10px 0 0; }
figure svg { display: block; width: 100%; max-width: calc(var(--pt-width) * 1.366px); height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: var(--muted); font-size: 13px; margin-top: 6px; }
details { border-top: 1px solid var(--line); padding: 10px 0; }
details:first-of-type { margin-top: 12px; }
details:last-of-type { padding-bottom: 0; }
summary { cursor: pointer; font-weight: 600; }
summary .muted { font-weight: 400; margin-left: 6px; }
details > :not(summary) { margin-top: 10px; }
pre { font: 13px/1.5 var(--mono); margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
table.samples { width: 100%; table-layout: fixed; }
table.samples td { font-size: 13.5px; }
table.samples .said { white-space: pre-wrap; overflow-wrap: anywhere; display: block; unicode-bidi: isolate; }
table.samples .prompt { color: var(--muted); max-height: 12em; overflow: auto; }
img.thumbnail { display: block; height: 64px; max-width: 128px; object-fit: contain; image-rendering: pixelated;
  border: 1px solid var(--line); border-radius: 4px; margin-bottom: 4px; }
.said:has(.thumbnail ~ .thumbnail) .thumbnail { display: inline-block; height: 40px; margin: 2px;
  vertical-align: middle; }
.verdict { display: inline-block; border-radius: 5px; padding: 0 6px; font-size: 12px; font-weight: 600;
  margin-bottom: 2px; }
.verdict.right { background: var(--good-wash); color: var(--good); }
.verdict.wrong { background: var(--bad-wash); color: var(--bad); }
.verdict.part { background: var(--line); color: var(--ink); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; padding: 0; margin: 0; list-style: none; font-size: 14px; }
.stack { display: flex; height: 14px; border-radius: 7px; overflow: hidden; gap: 2px; margin: 6px 0 10px; }
.stack i { display: block; min-width: 2px; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
footer { color: var(--muted); font-size: 13px; margin-top: 26px; }
@media (max-width: 760px) {
  figure { overflow-x: auto; } figure svg { min-width: 680px; }
}
@media (max-width: 640px) {
  main { padding: 28px 14px 48px; } section { padding: 18px 16px; } h1 { font-size: 27px; }
}
@media print {
  :root { color-scheme: light; --page: #fff; --surface: #fff; --ink: #000; --muted: #444; --grid: #ccc; --faint: #aaa;
    --line: #ccc;
    --heat: #08519c; --on-heat: #fff; --good: #00714f; --bad: #b3400a; --good-wash: #fff; --bad-wash: #fff; LIGHT }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 11px; } main { max-width: none; padding: 0; } h1 { font-size: 24px; }
  section { border: 0; padding: 6px 0; margin-top: 14px; }
  .card { padding: 8px 10px; } .card .value { font-size: 22px; }
  .cards { grid-template-columns: repeat(4, 1fr); gap: 8px; }
  figure svg { min-width: 0; } figure, .card, tr, h2, h3 { break-inside: avoid; } h2, h3, .note { break-after: avoid; }
  details:not(.raw)::details-content { content-visibility: visible; block-size: auto; }
  .scroll { overflow: visible; } table.heat td { min-width: 0; }
  table.samples .prompt { max-height: none; overflow: visible; }
}
"""


def _variables(colours: tuple[str, ...]) -> str:
    return " ".join(f"--series-{number}: {colour};" for number, colour in enumerate(colours))


STYLE_SHEET = _CSS.replace("LIGHT", _variables(SERIES[:-1])).replace("DARK", _variables(_DARK_SERIES))
