"""Class names turned into captions by prompt templates."""

from __future__ import annotations

from collections.abc import Sequence

from ftfast.errors import DataError

# Hand-written templates of CoOp (Zhou et al., 2022), one per data set of its few-shot benchmark.
_NAMED: dict[str, tuple[str, ...]] = {
    "simple": ("a photo of a {}.",),
    "caltech101": ("a photo of a {}.",),
    "oxford_pets": ("a photo of a {}, a type of pet.",),
    "stanford_cars": ("a photo of a {}.",),
    "oxford_flowers": ("a photo of a {}, a type of flower.",),
    "food101": ("a photo of {}, a type of food.",),
    "fgvc_aircraft": ("a photo of a {}, a type of aircraft.",),
    "sun397": ("a photo of a {}.",),
    "dtd": ("{} texture.",),
    "eurosat": ("a centered satellite photo of {}.",),
    "ucf101": ("a photo of a person doing {}.",),
}


def template_names() -> tuple[str, ...]:
    """Return the names that :func:`resolve_templates` knows."""
    return ("openai", *_NAMED)


def resolve_templates(templates: Sequence[str] | str) -> tuple[str, ...]:
    """Expand named template sets and check the rest.

    ``"openai"`` stands for the 80 templates of CLIP's ImageNet evaluation (Radford et al., 2021; taken from
    open_clip); ``"simple"`` and CoOp's data set names stand for one template each.

    Args:
        templates: Templates with one ``{}`` each, names, or a mixture.

    Returns:
        Templates with one ``{}`` each, in order.

    Raises:
        DataError: A template without exactly one ``{}``, or none at all.
    """
    resolved: list[str] = []
    for template in (templates,) if isinstance(templates, str) else templates:
        if template == "openai":
            from open_clip import OPENAI_IMAGENET_TEMPLATES

            resolved += [make("{}") for make in OPENAI_IMAGENET_TEMPLATES]
        elif template in _NAMED:
            resolved += _NAMED[template]
        elif template.count("{}") == 1:
            resolved.append(template)
        else:
            raise DataError(
                f"data.templates: '{template}' has {template.count('{}')} places for the class name; write it once as "
                f"{{}}, as in 'a photo of a {{}}.', or use a named set: {', '.join(template_names())}."
            )
    if not resolved:
        raise DataError("data.templates is empty; give at least one, such as 'a photo of a {}.'.")
    return tuple(resolved)


def class_prompts(class_names: Sequence[str], templates: Sequence[str] | str) -> list[list[str]]:
    """Put every class name into every template.

    Underscores in class names become spaces, as in CoOp, since folder names often carry them.

    Args:
        class_names: C names.
        templates: T templates, or names that :func:`resolve_templates` knows.

    Returns:
        C lists of T captions; average their text features per class for a zero-shot classifier.

    Raises:
        DataError: A template without exactly one ``{}``.
    """
    resolved = resolve_templates(templates)
    # replace, not format: a class name may itself hold braces
    return [[template.replace("{}", name.replace("_", " ")) for template in resolved] for name in class_names]
