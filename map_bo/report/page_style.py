"""The look of the page of a run: phone, desktop, dark and print, with no script and no network."""

from __future__ import annotations

import base64
import hashlib

__all__ = ["STYLE", "styled"]

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --soft: #57606a;
  --line: #d5dae0; --band: #f5f7f9; --predicted: #005a8c; --real: #a84300; --accent: #005a8c; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e6e9ec; --soft: #a5aeb8; --line: #3a4149; --band: #1d2125;
    --predicted: #7cc4f2; --real: #ffa564; --accent: #7cc4f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 .25rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; padding-top: .5rem;
  border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 44rem; }
.soft { color: var(--soft); }
a { color: var(--accent); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; margin: .5rem 0;
  list-style: none; }
nav a { display: inline-block; padding: .25rem 0; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dl.facts dt { color: var(--soft); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
figure { margin: 1rem 0; }
figure .scroll { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: 4px; }
figcaption { color: var(--soft); margin-top: .25rem; }
.scroll { overflow-x: auto; max-width: 100%; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; color: var(--soft); padding: .25rem 0; }
th, td { padding: .25rem .5rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { background: var(--band); vertical-align: bottom; }
thead th.group { text-align: center; border-left: 1px solid var(--line); }
th.name, td.name { text-align: left; }
td.long { text-align: left; white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
tbody th { font-weight: 600; }
tbody tr:nth-child(even) { background: var(--band); }
.predicted { color: var(--predicted); }
.real { color: var(--real); font-weight: 600; }
td small { display: block; color: var(--soft); font-size: .85em; }
details { margin: .5rem 0; }
summary { cursor: pointer; padding: .35rem 0; font-weight: 600; }
@media (max-width: 34rem) {
  body { padding: .75rem; }
  dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: .4rem; }
  .scroll .wide { max-width: none; width: 44rem; } }
@media print {
  :root { --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --band: #f2f2f2;
    --predicted: #005a8c; --real: #a84300; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  nav, details:not([open]) { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding: .1rem .3rem; white-space: normal; overflow-wrap: anywhere; }
  thead { display: table-header-group; }
  figure img { max-height: 13cm; width: auto; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; } }
"""
"""The style sheet, which is written into the head of the page."""


def styled(style: str) -> str:
    """Return the part of a page's head that holds a style sheet, and forbids all else.

    By its content security policy the page takes this style sheet, by its hash, and pictures that
    it holds itself; a browser runs no script in it and fetches nothing, whatever a record says.
    """
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    return (
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>\n'
    )
