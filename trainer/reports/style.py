"""The report's style sheet, light or dark by the reader's setting, for wide and narrow screens. Owns all colours."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root { --page: #f7f7f5; --card: #ffffff; --ink: #1c1c1a; --muted: #66655f; --edge: #e2e1db; --training: #2a6fc9;
  --validation: #c2571a; --made: #eef4fc; }
@media (prefers-color-scheme: dark) { :root { --page: #151514; --card: #1e1e1c; --ink: #ececea; --muted: #a3a199;
  --edge: #36352f; --training: #6aa5ee; --validation: #ee935c; --made: #1d2b3d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .75rem; }
h2 .muted { font-weight: normal; font-size: .85rem; }
.muted { color: var(--muted); }
p { margin: .5rem 0; }
.version, code { overflow-wrap: anywhere; font-size: .85rem; }
.version { color: var(--muted); }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0 0; }
.tiles div { background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  padding: .6rem 1rem; min-width: 8rem; }
.tiles dt { color: var(--muted); font-size: .8rem; }
.tiles dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .75rem; }
figure { margin: 0; max-width: 40rem; background: var(--card); border: 1px solid var(--edge);
  border-radius: 8px; padding: .75rem; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
.grid { stroke: var(--edge); stroke-width: 1; }
.tick { fill: var(--muted); }
.name { fill: var(--ink); }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.curve.training { stroke: var(--training); } .dot.training { fill: var(--training); }
.curve.validation { stroke: var(--validation); } .dot.validation { fill: var(--validation); }
.best { fill: var(--card); stroke: var(--validation); stroke-width: 2; }
table { border-collapse: collapse; background: var(--card); border: 1px solid var(--edge); border-radius: 8px; }
th, td { padding: .35rem .9rem; text-align: left; vertical-align: top; border-top: 1px solid var(--edge); }
thead th, tbody:first-child tr:first-child > * { border-top: 0; }
thead th { color: var(--muted); font-weight: normal; font-size: .85rem; }
.number, .scores thead th + th { text-align: right; font-variant-numeric: tabular-nums; }
.facts { width: 100%; font-size: .85rem; }
.facts th { font-weight: normal; color: var(--muted); width: 17rem; }
.facts td { overflow-wrap: anywhere; }
article { background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  padding: .75rem 1rem; margin: 0 0 .75rem; }
.tags { margin: 0 0 .4rem; display: flex; flex-wrap: wrap; gap: .4rem; }
.tag { font-size: .8rem; color: var(--muted); border: 1px solid var(--edge); border-radius: 999px; padding: 0 .6rem; }
article dl { display: grid; grid-template-columns: 6rem 1fr; gap: .4rem .75rem; margin: 0; }
article dt { color: var(--muted); font-size: .85rem; }
article dd { margin: 0; }
article dl { align-items: baseline; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; min-width: 0;
  max-height: 24rem; overflow: auto; }
.text ul { margin: 0; padding-left: 1.1rem; }
.made { background: var(--made); border-radius: 6px; padding: .2rem .5rem; margin: 0 -.5rem; }
@media (max-width: 38rem) { article dl { grid-template-columns: 1fr; gap: .15rem; } article dt { margin-top: .4rem; }
  .made { margin: 0; } th, td { padding: .3rem .6rem; } .facts th { width: 9rem; } }
"""
