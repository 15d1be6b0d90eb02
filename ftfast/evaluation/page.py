"""The report's HTML: one self-contained file with inline style, pictures as data URIs, light and dark."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ftfast.evaluation.drawing import Plot
from ftfast.evaluation.results import SummaryRow
from ftfast.evaluation.tables import after_text, percent, share_of_reference, signed

_STYLE = """
:root{color-scheme:light dark;--bg:#f5f7fa;--card:#fff;--ink:#1b2430;--muted:#66717f;--line:#e4e8ee;--accent:#0072b2;
--good:#00795a;--bad:#b8440a;--bar:#cfe3f0;--shadow:0 1px 2px rgba(20,30,45,.06),0 6px 24px rgba(20,30,45,.05)}
@media(prefers-color-scheme:dark){:root{--bg:#10151c;--card:#171d26;--ink:#e8edf4;--muted:#94a1b2;--line:#2b3441;
--accent:#4aa8e0;--good:#2fc79b;--bad:#f08043;--bar:#24435a;--shadow:none}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1060px;margin:0 auto;padding:40px 20px 64px}
header h1{font-size:clamp(1.6rem,4.5vw,2.3rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 6px}
.subtitle{color:var(--muted);margin:0 0 18px}
.lead{font-size:1.12rem;margin:0 0 26px;max-width:46em}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(220px,1fr));gap:16px;margin:0 0 20px}
.card,section{background:var(--card);border:1px solid var(--line);border-radius:14px;box-shadow:var(--shadow)}
.card{padding:18px 22px}
.card .label{color:var(--muted);font-size:.8rem;font-weight:600;letter-spacing:.08em;text-transform:uppercase}
.card .value{font-size:2.5rem;font-weight:700;letter-spacing:-.03em;line-height:1.2;font-variant-numeric:tabular-nums}
.card .value small{font-size:1rem;font-weight:500;letter-spacing:0;color:var(--muted);margin-left:.3em}
.card .detail{color:var(--muted);font-size:.92rem}
.grid{display:flex;flex-wrap:wrap;gap:20px}
section{padding:22px 24px;flex:1 1 calc(50% - 10px);min-width:min(100%,420px)}
section.wide{flex-basis:100%}
h2{font-size:1.06rem;margin:0 0 14px;letter-spacing:-.01em}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:9px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
tr:last-child>*{border-bottom:0}
thead th{color:var(--muted);font-size:.8rem;font-weight:600}
th[scope=row],td.text{text-align:left;font-weight:500;white-space:normal}
td small,th small{display:block;color:var(--muted);font-weight:400;font-size:.82rem}
.role{display:inline-block;
font-size:.72rem;font-weight:600;padding:1px 8px;border-radius:99px;border:1px solid var(--line);
color:var(--muted);margin-right:8px;vertical-align:1px}
.role.target{color:var(--accent);border-color:currentColor}
.good{color:var(--good);font-weight:600}.bad{color:var(--bad);font-weight:600}
.meter{position:relative;display:inline-block;width:74px;height:8px;border-radius:9px;background:var(--line);
margin-left:10px;overflow:hidden;vertical-align:1px}
.meter i{position:absolute;inset:0 auto 0 0;background:var(--accent);border-radius:9px}
figure{margin:0 auto;max-width:560px}.wide figure{max-width:800px}
figure img{display:block;width:100%;height:auto;border-radius:8px}
figcaption,.note{color:var(--muted);font-size:.9rem;margin:12px 0 0}
a{color:var(--accent)}
.facts th{width:1%;white-space:nowrap;color:var(--muted);font-weight:500}
.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}
details{margin-top:14px}summary{cursor:pointer;color:var(--accent)}
pre{overflow:auto;
background:var(--bg);border:1px solid var(--line);border-radius:8px;padding:14px;font-size:.82rem;line-height:1.45}
footer{color:var(--muted);font-size:.85rem;margin-top:28px;text-align:center}
@media(max-width:760px){main{padding:24px 12px 48px}.grid{gap:14px}
section{padding:16px 14px}th,td{padding:8px 7px;font-size:.92rem}.meter{display:none}
.role{display:block;width:fit-content;margin:0 0 3px}.card{padding:14px 16px}.card .value{font-size:2rem}
.cards{grid-template-columns:1fr 1fr;gap:12px}.card:nth-child(3){grid-column:1/-1}}
@media print{body{background:#fff}section,.card{box-shadow:none;break-inside:avoid}}
"""


@dataclass(frozen=True)
class Card:
    """A large figure: its label, the value with its unit, and a line of detail."""

    label: str
    value: str
    unit: str
    detail: str


@dataclass(frozen=True)
class Section:
    """A box of the page; wide ones take the whole row."""

    title: str
    body: str
    wide: bool = False


def page(title: str, subtitle: str, lead: str, cards: Sequence[Card], sections: Sequence[Section]) -> str:
    """Put the page together.

    Args:
        title: Heading and window title.
        subtitle: Line under it.
        lead: One sentence of result.
        cards: Large figures.
        sections: Boxes in order; their bodies are HTML already.

    Returns:
        A complete HTML document that refers to no other file, except links.
    """
    boxes = "".join(
        f"<div class=card><div class=label>{html.escape(card.label)}</div>"
        f"<div class=value>{html.escape(card.value).replace('-', '−')}<small>{html.escape(card.unit)}</small></div>"
        f"<div class=detail>{html.escape(card.detail)}</div></div>"
        for card in cards
    )
    body = "".join(
        f"<section{' class=wide' if s.wide else ''}><h2>{html.escape(s.title)}</h2>{s.body}</section>" for s in sections
    )
    return (
        f'<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,'
        f'initial-scale=1"><title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>'
        f"<header><h1>{html.escape(title)}</h1><p class=subtitle>{html.escape(subtitle)}</p>"
        f"<p class=lead>{html.escape(lead)}</p></header><div class=cards>{boxes}</div>"
        f"<div class=grid>{body}</div><footer>Written by ftfast.</footer></main></body></html>\n"
    )


def figure_html(plot: Plot, light: bytes, dark: bytes) -> str:
    """A plot's two PNGs as a figure with its caption; the browser picks the light or the dark picture."""
    day, night = (base64.b64encode(picture).decode("ascii") for picture in (light, dark))
    return (
        f'<figure><picture><source media="(prefers-color-scheme:dark)" srcset="data:image/png;base64,{night}">'
        f'<img alt="{html.escape(plot.title)}" src="data:image/png;base64,{day}"></picture>'
        f'<figcaption>{html.escape(plot.caption)} <a href="{html.escape(plot.name)}.csv">CSV</a></figcaption></figure>'
    )


def _name_cell(row: SummaryRow) -> str:
    return f"<th scope=row><span class='role {row.role}'>{row.role}</span>{html.escape(row.title)}</th>"


def _minus(change: float) -> str:
    """A signed difference with a true minus sign, which is as wide as the plus."""
    return signed(change).replace("-", "−")


def _change_class(row: SummaryRow) -> str:
    if row.role == "target":
        return "good" if row.change > 0 else "bad"
    return "" if math.isnan(row.kept) or 0.9 <= row.kept < 1 else ("good" if row.kept >= 1 else "bad")


def summary_table(rows: Sequence[SummaryRow]) -> str:
    """The before/after table."""
    body = ""
    for row in rows:
        kept = ""
        if row.role == "control" and not math.isnan(row.kept):
            share = max(min(row.kept, 1.0), 0.0)
            kept = f"{percent(row.kept)} %<span class=meter><i style='width:{100 * share:.0f}%'></i></span>"
        body += (
            f"<tr>{_name_cell(row)}<td>{percent(row.before)}</td><td>{after_text(row)}</td>"
            f"<td class='{_change_class(row)}'>{_minus(row.change)}</td><td>{kept}</td></tr>"
        )
    head = "<tr><th scope=col></th><th>before</th><th>after</th><th>change</th><th>kept</th></tr>"
    return f"<div class=scroll><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"


def comparison_table(tables: Mapping[str, Sequence[SummaryRow]], notes: Mapping[str, str]) -> str:
    """Runs side by side: value, change, and from the second run on the change as a share of the first run's.

    Args:
        tables: Run name -> summary rows over the same suites.
        notes: Run name -> remark under the name.

    Returns:
        HTML.
    """
    names = list(tables)
    head = "".join(f"<th>{html.escape(name)}<small>{html.escape(notes.get(name, ''))}</small></th>" for name in names)
    body = ""
    for place, row in enumerate(tables[names[0]]):
        body += f"<tr>{_name_cell(row)}<td>{percent(row.before)}</td>"
        for name in names:
            mine = tables[name][place]
            remark = ""
            if name != names[0]:
                share = share_of_reference(mine, row)
                if not math.isnan(share):
                    what = "gain" if row.change > 0 else "loss"
                    text = f"{100 * share:.0f} % of {names[0]}’s {what}" if share > 0 else f"no {what}"
                    remark = f"<small>{html.escape(text)}</small>"
            change = f"<span class='{_change_class(mine)}'>{_minus(mine.change)}</span>"
            body += f"<td>{after_text(mine)} {change}{remark}</td>"
        body += "</tr>"
    return (
        f"<div class=scroll><table><thead><tr><th scope=col></th><th>pretrained</th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
