"""The model card that lies beside exported weights."""

from __future__ import annotations

from collections.abc import Sequence

from ftfast.evaluation.report import ReportInfo
from ftfast.evaluation.results import SummaryRow
from ftfast.evaluation.tables import headline, summary_markdown


def model_card(info: ReportInfo, rows: Sequence[SummaryRow], papers: Sequence[str] = ()) -> str:
    """Write the card.

    The licence is left for the user: it depends on the base weights and on the training data.

    Args:
        info: The report's names and facts; ``info.weights`` is the folder in the load snippet.
        rows: Before/after rows.
        papers: Citations of the recipe and its terms, one line each.

    Returns:
        Markdown with a YAML header.
    """
    base = " ".join(part for part in (info.model, info.pretrained) if part)
    folder = info.weights or "path/to/final"
    config = f"```yaml\n{info.config.strip()}\n```" if info.config else ""
    facts = "\n".join(f"- {name}: {value}" for name, value in info.facts.items())
    cited = "\n".join(f"- {paper}" for paper in papers)
    sections = [
        "---\nlibrary_name: open_clip\ntags:\n- clip\n- ftfast\nlicense: # to be filled in by you\n---",
        f"# {info.title}",
        f"{base}, fine-tuned with ftfast's recipe `{info.recipe}`: {headline(rows)}",
        "## Use",
        "```python\nimport open_clip\n\n"
        f'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")\n'
        f'tokenizer = open_clip.get_tokenizer("local-dir:{folder}")\n```',
        "## What was learned and what was kept",
        summary_markdown(rows),
        "Values are percentages. Controls are what the start model could do and should still do.",
        "## Training",
        "\n".join(line for line in (f"- Data: {info.data}" if info.data else "", facts) if line),
        f"## Citations\n\n{cited}" if cited else "",
        f"<details><summary>Configuration</summary>\n\n{config}\n\n</details>" if config else "",
        "## Licence",
        "Not stated yet. Fill in the licence that the base weights and the training data allow.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"
