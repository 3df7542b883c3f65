"""How the page looks: one style sheet, light and dark, and the colours that figures name.

Blue and vermilion stay apart for all common kinds of colour blindness, and every pair that a figure compares differs in
dash, marker or fill as well.
"""

from __future__ import annotations

CLASS_COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#b8a800", "#8c564b", "#7f7f7f", "#7a4fbf", "#17a5a5",
)  # fmt: skip
"""Of given labels, in class order (Okabe and Ito's, and more where those run out); readable on white and on black."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --box: #f5f6f8; --ink: #1b1f24; --soft: #59626e; --rule: #d5dae0;
  --clean: #0067a5; --poisoned: #c24a00; --mark: #1b1f24;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --box: #1e2329; --ink: #e7eaee; --soft: #a3adb9; --rule: #39424d;
    --clean: #5bb8f0; --poisoned: #ff9152; --mark: #ffffff;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
}
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem clamp(.9rem, 4vw, 2rem) 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { max-width: 46rem; margin: .5rem 0; }
.verdict { font-size: 1.2rem; line-height: 1.45; margin: 0 0 .6rem; }
.note, figcaption, .facts { color: var(--soft); font-size: .875rem; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 600; font-size: .875rem; vertical-align: bottom; }
tbody th { font-weight: 600; }
th.group { color: var(--soft); padding-top: 1rem; font-size: .875rem; }
.defended td { font-weight: 600; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem 1.5rem; }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure > svg { display: block; width: 100%; max-width: 34rem; height: auto; }
figure > strong { display: block; font-size: .9375rem; margin: .4rem 0 .1rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0; margin: .6rem 0;
  font-size: .875rem; }
.legend svg { width: 1.7em; height: .9em; margin-right: .4em; vertical-align: -.05em; overflow: visible; }
.suspects { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .75rem; padding: 0;
  margin: .75rem 0; list-style: none; }
.suspects li { background: var(--box); border-radius: 6px; padding: .5rem; min-width: 0; font-size: .8125rem;
  line-height: 1.35; border-left: 4px solid var(--rule); }
.suspects li.poisoned { border-left-color: var(--poisoned); }
.suspects li.clean { border-left-color: var(--clean); }
.suspects img { display: block; width: 100%; aspect-ratio: 1; image-rendering: pixelated; border-radius: 3px;
  margin-bottom: .4rem; }
.suspects b { display: block; }
.suspects .flag { font-weight: 600; }
.poisoned .flag { color: var(--poisoned); }
.clean .flag { color: var(--clean); }
.suspects .from { display: block; color: var(--soft); font-size: .75rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .25rem 0; }
details table { font-size: .8125rem; }
details th, details td { padding: .15rem .9rem .15rem 0; text-align: left; }
details td { white-space: normal; overflow-wrap: anywhere; }
details .numbers td { text-align: right; white-space: nowrap; }
@media print { details { display: none; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""
