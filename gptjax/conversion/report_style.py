"""The style sheet of the HTML report, for light and dark screens and for paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1b2430; --soft: #5b6675; --line: #d9dee5; --band: #f4f6f8;
  --good: #10643a; --good-band: #e6f4ec; --bad: #9b1c1c; --bad-band: #fdecea;
  --equal: #e3e7ec; --low1: #d3e5f7; --low2: #9cc5ea; --low3: #4f94cd; --low4: #1f5f99;
  --high1: #f5b942; --high2: #e5701f; --high3: #b01e1e; --mark: #1b2430;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --ink: #e4e9ef; --soft: #98a4b3; --line: #303945; --band: #1a2028;
    --good: #7fd6a5; --good-band: #14301f; --bad: #ff9d94; --bad-band: #3a1716;
    --equal: #2a323d; --low1: #1f3f5f; --low2: #2a628f; --low3: #4593c9; --low4: #a5d4f7;
    --high1: #f0b840; --high2: #f07f35; --high3: #f0463c; --mark: #ffffff;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.25rem 0 .75rem; }
.against { margin: .25rem 0 1.25rem; color: var(--soft); overflow-wrap: anywhere; }
.verdict { margin: 0; padding: .7rem 1rem; border-radius: .4rem; border-left: .3rem solid; }
.good { color: var(--good); background: var(--good-band); }
.verdict.bad { color: var(--bad); background: var(--bad-band); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }

.heat { width: 100%; table-layout: fixed; border-collapse: separate; border-spacing: 1px; }
.heat th { font-weight: 400; font-size: .72rem; line-height: 1; color: var(--soft); padding: 0; }
.heat th:first-child { width: 4.2rem; text-align: left; font-size: .8rem; }
.heat thead th { height: 4.8rem; vertical-align: bottom; padding-bottom: .3rem; }
.heat thead span { writing-mode: vertical-rl; transform: rotate(180deg); }
.heat th.panel { padding: .7rem 0 .2rem; color: var(--ink); font-weight: 600; }
.heat td { height: 1.35rem; padding: 0; text-align: center; line-height: 1;
  font-size: .8rem; font-weight: 700; border-radius: 2px; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .35rem 1.1rem;
  margin: .9rem 0 0; padding: 0; font-size: .8rem; color: var(--soft); }
.legend i { display: inline-block; width: 1.1rem; height: .8rem; margin-right: .4rem;
  border-radius: 2px; vertical-align: -.05rem; }
.equal { background: var(--equal); }
.low1 { background: var(--low1); }
.low2 { background: var(--low2); }
.low3 { background: var(--low3); }
.low4 { background: var(--low4); }
.high1 { background: var(--high1); color: #000; }
.high2 { background: var(--high2); color: #000; }
.high3 { background: var(--high3); color: #fff; }
.none { background: none; }
.first { outline: 2px solid var(--mark); outline-offset: -1px; }

.numbers { width: 100%; font-size: .85rem; }
.numbers th, .numbers td { text-align: left; padding: .22rem .9rem .22rem 0;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
.numbers th { color: var(--soft); font-weight: 600; }
.numbers tr.bad td { color: var(--bad); font-weight: 600; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.25rem; margin: 0;
  font-size: .9rem; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 2.25rem; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .75rem; }
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  .wide { overflow: visible; }
  tr { break-inside: avoid; }
}
"""
