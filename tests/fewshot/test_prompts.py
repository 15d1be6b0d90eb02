"""Learned prompts: places of contexts, step 0, losses, files, transplants between models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.config.schema import DataConfig, ModelConfig
from ftfast.data import Batch, open_dataset
from ftfast.errors import ConfigError, ModelError
from ftfast.models import LoadedModel, load_model
from ftfast.models.prompt_files import load_prompt, read_facts, save_prompt, transplant_problems
from ftfast.models.prompts import PromptLearner, PromptSpec, TextPath
from ftfast.recipes import Context, Features, Plan, get_recipe

NAMES = ("cat", "snow leopard", "x-ray fish", "grand_piano", "photo of a photo")
METHODS = {
    "coop": PromptSpec(),
    "cocoop": PromptSpec(image_conditioned=True),
    "contcoop": PromptSpec(attention=True, recompute_words=True),
    "contcoop, pooled": PromptSpec(attention=True, pooled=True, recompute_words=True),
    "contcoop, stored words": PromptSpec(attention=True),
    "contcoop, tokens": PromptSpec(token_mixing=True, recompute_words=True),
}


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model(ModelConfig(name="tiny-clip-v1"))


@pytest.fixture(scope="module")
def upgraded() -> LoadedModel:
    return load_model(ModelConfig(name="tiny-clip-v2"))


def hand_written(loaded: LoadedModel, names: tuple[str, ...] = NAMES, start: str = "a photo of a") -> Tensor:
    texts = [f"{start} {name}.".replace("_", " ") for name in names]
    with torch.no_grad():
        return F.normalize(loaded.model.encode_text(loaded.tokenizer(texts)), dim=-1)


def stirred(learner: PromptLearner, seed: int = 1) -> PromptLearner:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return learner


@pytest.mark.parametrize("method", [name for name in METHODS if name != "cocoop"])
@pytest.mark.parametrize("init_text", ["a photo of a", "an icon of a small"])
def test_step_zero_is_exactly_the_hand_written_prompt(tiny: LoadedModel, method: str, init_text: str) -> None:
    spec = PromptSpec(**{**vars(METHODS[method]), "init_text": init_text})
    features = PromptLearner(tiny, spec, NAMES).class_features(NAMES)
    assert torch.equal(features, hand_written(tiny, start=init_text))


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_learns_and_the_clip_does_not(tiny: LoadedModel, method: str) -> None:
    tiny.model.requires_grad_(False)
    learner = stirred(PromptLearner(tiny, METHODS[method], NAMES))
    images = F.normalize(torch.randn(3, 256, generator=torch.Generator().manual_seed(0)), dim=-1)
    features = learner.class_features(NAMES, images)
    assert features.shape == ((3, 5, 256) if method == "cocoop" else (5, 256))
    features.square().mul(torch.arange(256.0)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in learner.parameters())
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    assert not any("table" in name or "model" in name for name in learner.state_dict())


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_contexts_stand_where_they_should(tiny: LoadedModel, position: str) -> None:
    """A prompt whose contexts are embeddings of real words equals that sentence."""
    learner = PromptLearner(tiny, PromptSpec(init_text="", context_length=3, position=position))
    words = learner.path.words("red green blue")
    with torch.no_grad():
        learner.context.copy_(learner.path.table.weight[words])
    sentence = {"end": "red green blue {}.", "middle": "red green {} blue.", "front": "{} red green blue."}[position]
    texts = [sentence.format(name.replace("_", " ")) for name in NAMES]
    expected = F.normalize(tiny.model.encode_text(tiny.tokenizer(texts)), dim=-1)
    assert torch.allclose(learner.class_features(NAMES), expected, atol=1e-6)


def test_attention_reads_the_tokens_of_the_class_name_only(tiny: LoadedModel) -> None:
    learner = stirred(PromptLearner(tiny, METHODS["contcoop"]))
    table = learner.path.table.weight.detach()
    base = table[learner.path.words("a photo of a")] + learner.context
    for name in NAMES:
        e = table[learner.path.words(name.replace("_", " "))].double()
        q, k, v = (base.double() @ learner.query.weight.double().T, e @ learner.key.weight.double().T, None)
        v = e @ learner.value.weight.double().T
        found = (q @ k.T / 32**0.5).softmax(-1) @ v @ learner.output.weight.double().T
        tokens, places, mask = learner._places((name,))
        context = learner._contexts((name,), table[tokens].float(), mask)[0]
        assert torch.allclose(context.double(), base.double() + found, atol=1e-5)
        assert tokens[0, places[0]].tolist() == learner.path.words("a photo of a").tolist()


def test_token_mixing_mixes_embeddings_of_names(tiny: LoadedModel) -> None:
    learner = stirred(PromptLearner(tiny, METHODS["contcoop, tokens"], NAMES))
    table = learner.path.table.weight.detach().double()
    vocabulary = sorted(
        {int(token) for name in (*NAMES, "a photo of a") for token in learner.path.words(name.replace("_", " "))}
    )
    assert learner.vocabulary.tolist() == vocabulary
    for name in ("dog", "grand_piano"):  # any name, also one that was not trained on
        tokens, _, mask = learner._places((name,))
        found = learner._contexts((name,), table.float()[tokens], mask)[0]
        mean = table[learner.path.words(name.replace("_", " "))].mean(0)
        expected = table[learner.path.words("a photo of a")] + learner.mixture.double() @ table[vocabulary]
        expected = expected + learner.gain.double() * mean
        assert torch.allclose(found.double(), expected, atol=1e-5)


def test_token_mixing_moves_to_another_width(tiny: LoadedModel, tiny_folder: Path, tmp_path: Path) -> None:
    folder = save_prompt(
        tmp_path / "prompt", PromptLearner(tiny, METHODS["contcoop, tokens"], NAMES), tiny, recipe="contcoop"
    )
    narrow = load_model(ModelConfig(name=str(tiny_folder)))
    assert torch.equal(load_prompt(folder, narrow).class_features(NAMES), hand_written(narrow))
    with pytest.raises(ConfigError, match="token_mixing needs recompute_words"):
        PromptLearner(tiny, PromptSpec(token_mixing=True))


def test_cocoop_shifts_contexts_by_the_image(tiny: LoadedModel) -> None:
    learner = stirred(PromptLearner(tiny, METHODS["cocoop"]))
    images = F.normalize(torch.randn(4, 256, generator=torch.Generator().manual_seed(0)), dim=-1)
    together = learner.class_features(NAMES, images)
    for image, features in zip(images, together, strict=True):
        alone = PromptLearner(tiny, PromptSpec())
        with torch.no_grad():
            alone.context.copy_(learner.context + learner.meta(image))
        assert torch.allclose(alone.class_features(NAMES), features, atol=1e-5)
    expected = torch.einsum("nd,ncd->nc", images, together)
    assert torch.allclose(learner.scores(images, NAMES, chunk=3), expected, atol=1e-5)


def test_class_specific_contexts_refuse_other_classes(tiny: LoadedModel) -> None:
    learner = PromptLearner(tiny, PromptSpec(class_specific=True), NAMES)
    assert learner.context.shape == (5, 4, 32)
    with torch.no_grad():
        learner.context[2] *= -1
    changed = (learner.class_features(NAMES) - hand_written(tiny)).abs().amax(1) > 1e-4
    assert changed.tolist() == [False, False, True, False, False]
    with pytest.raises(ConfigError, match=r"none for 'dog'. Class-specific contexts cannot be moved"):
        learner.class_features(("cat", "dog"))


def test_contexts_that_do_not_fit_are_refused(tiny: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="24 tokens the model reads"):
        PromptLearner(tiny, PromptSpec(init_text="", context_length=40)).class_features(NAMES)
    with pytest.raises(ConfigError, match="at least one context"):
        PromptLearner(tiny, PromptSpec(init_text="", context_length=0))


def plan_of(recipe: str, loaded: LoadedModel, table: Path, **options: object) -> tuple[Plan, Context]:
    dataset = open_dataset(DataConfig(path=str(table), templates=("a photo of a {}.", "an icon of a {}.")))
    method = get_recipe(recipe)
    context = Context(loaded, {"data": dataset}, method.options(**options))
    return method.build(context), context


@pytest.mark.parametrize(
    ("recipe", "options", "kind"),
    [
        ("coop", {}, ""),
        ("cocoop", {}, ""),
        ("kgcoop", {}, "features"),
        ("contcoop", {}, "features"),
        ("contcoop", {"knowledge": "class_scores", "knowledge_weight": 3.0}, "scores"),
        ("contcoop", {"weights": "tokens"}, "features"),
    ],
)
def test_losses_equal_their_formulas(
    tiny: LoadedModel, class_table: Path, recipe: str, options: dict[str, object], kind: str
) -> None:
    plan, context = plan_of(recipe, tiny, class_table, **options)
    learner = stirred(plan.heads["prompt"])
    labels = torch.tensor([0, 3, 9, 3, 7])
    images = F.normalize(torch.randn(5, 256, generator=torch.Generator().manual_seed(0)), dim=-1)
    f = Features(Batch(torch.zeros(5, 3, 1, 1), torch.arange(5), labels, None), images, None, torch.tensor(30.0))
    names = context.datasets["data"].class_names
    features = learner.class_features(names, images).detach().double()
    spread = features if features.ndim == 3 else features.expand(5, -1, -1)
    logits = 30 * torch.einsum("bd,bcd->bc", images.double(), spread)
    assert plan.terms[0].loss(f).item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert len(plan.terms) == (2 if kind else 1)
    each = torch.stack([hand_written(tiny, names), hand_written(tiny, names, "an icon of a")]).double()
    zero = F.normalize(each.mean(0), dim=-1)
    if kind == "features":
        assert plan.terms[1].weight == 8.0
        expected = 1 - (features * zero).sum(-1).mean()
    elif kind == "scores":
        assert plan.terms[1].weight == 3.0
        p0 = (30 * images.double() @ zero.T).log_softmax(-1)
        expected = (p0.exp() * (p0 - logits.log_softmax(-1))).sum(-1).mean()
    if kind:
        assert plan.terms[1].loss(f).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_prompt_is_the_same_prompt(tiny: LoadedModel, method: str, tmp_path: Path) -> None:
    learner = stirred(PromptLearner(tiny, METHODS[method], NAMES))
    folder = save_prompt(tmp_path / "prompt", learner, tiny, recipe="coop", settings="seed: 1\n")
    again = load_prompt(tmp_path, tiny)  # a run folder is enough
    images = hand_written(tiny)
    assert torch.equal(again.scores(images, NAMES), learner.scores(images, NAMES))
    facts = read_facts(folder)
    assert (facts.model, facts.width, facts.class_names) == ("tiny-clip-v1", 32, NAMES)
    assert facts.settings == "seed: 1\n"
    if method == "cocoop":
        assert not (folder / "class_features.safetensors").exists()
        return
    table = open_clip_free_table(folder)
    assert torch.allclose(images @ table.T, learner.scores(images, NAMES), atol=1e-6)


def open_clip_free_table(folder: Path) -> Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "class_features.safetensors")["class_features"]


def test_upgrade_recomputes_what_belongs_to_the_model(tiny: LoadedModel, upgraded: LoadedModel, tmp_path: Path) -> None:
    untrained = PromptLearner(tiny, METHODS["contcoop"], NAMES)
    folder = save_prompt(tmp_path / "a", untrained, tiny, recipe="contcoop")
    assert torch.equal(load_prompt(folder, upgraded).class_features(NAMES), hand_written(upgraded))
    stored = save_prompt(tmp_path / "b", PromptLearner(tiny, METHODS["coop"], NAMES), tiny, recipe="coop")
    learner = load_prompt(stored, upgraded)
    assert torch.equal(learner.context, tiny.model.token_embedding.weight[learner.path.words("a photo of a")])
    assert not torch.allclose(learner.class_features(NAMES), hand_written(upgraded), atol=1e-3)


def text_only(name: str, *, custom: bool) -> LoadedModel:
    """A model's text tower as open_clip configures it, one layer deep, random."""
    config = open_clip.get_model_config(name)
    tower = open_clip.model._build_text_tower(config["embed_dim"], {**config["text_cfg"], "layers": 1})
    tower.init_parameters() if hasattr(tower, "init_parameters") else None
    tower.requires_grad_(False)
    model = SimpleNamespace(text=tower, encode_text=lambda tokens, normalize=False: tower(tokens))
    if not custom:
        model.token_embedding = tower.token_embedding
    tokenizer = open_clip.get_tokenizer(name)
    return LoadedModel(model, None, None, tokenizer, dict(config), {}, name)  # type: ignore[arg-type]


@pytest.mark.parametrize(("old", "new", "width"), [("ViT-B-16", "EVA02-B-16", 512), ("ViT-L-14", "EVA02-L-14", 768)])
def test_real_pairs_of_models_accept_each_other_s_prompts(old: str, new: str, width: int, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = text_only(old, custom=False), text_only(new, custom=True)
    learner = stirred(PromptLearner(first, METHODS["contcoop"], NAMES))
    assert learner.context.shape == (4, width)
    folder = save_prompt(tmp_path / "prompt", learner, first, recipe="contcoop")
    moved = load_prompt(folder, second)
    assert moved.class_features(NAMES).shape == (5, width)
    assert not transplant_problems(read_facts(folder), second)


def test_impossible_transplants_are_sentences(tiny: LoadedModel, tiny_folder: Path, tmp_path: Path) -> None:
    folder = save_prompt(tmp_path / "prompt", PromptLearner(tiny, PromptSpec(), NAMES), tiny, recipe="coop")
    narrow = load_model(ModelConfig(name=str(tiny_folder)))
    with pytest.raises(ModelError, match=r"contexts of width 32 \(tiny-clip-v1\).*has width 16"):
        load_prompt(folder, narrow)
    facts = json.loads((folder / "prompt.json").read_text())
    facts["probe"][0] += 1
    (folder / "prompt.json").write_text(json.dumps(facts))
    with pytest.raises(ModelError, match="split text into different tokens"):
        load_prompt(folder, tiny)
    with pytest.raises(ModelError, match=r"holds no prompt.json"):
        load_prompt(tmp_path / "nothing", tiny)
    (folder / "prompt.json").write_text("{")
    with pytest.raises(ModelError, match="is not a prompt that ftfast saved"):
        load_prompt(folder, tiny)


def test_other_text_towers_and_tokenizers_are_refused(tiny: LoadedModel) -> None:
    odd = LoadedModel(tiny.model, None, None, lambda texts: None, {}, {}, "hf-model")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="'hf-model' does not use CLIP's tokenizer"):
        TextPath(odd)
    odd.model = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="without a token embedding table"):
        TextPath(odd)
