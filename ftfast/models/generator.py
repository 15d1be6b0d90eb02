"""The built-in generator: a small text-conditional diffusion model of 32-pixel drawings, on top of diffusers.

It denoises pixels (no autoencoder) that are folded two by two into channels, so that the network works at 16x16 and
8x8. A prompt enters as the text features of tiny-clip-v1, in two ways: added to the embedding of the time step, which
scales and shifts every normalisation (Nichol and Dhariwal, 2021; Ho and Salimans, 2022 for the guidance), and as a
16-pixel sketch that two linear layers paint from the features and from a drawing hand, which is drawn at random. The
diffusion makes the difference between drawing and enlarged sketch (as Whang et al., 2022, for deblurring), so a network
this small is trained in minutes instead of hours. It predicts the velocity (Salimans and Ho, 2022) under a cosine
schedule with zero terminal signal (Lin et al., 2023).

Importing this module needs diffusers (``pip install 'ftfast[synth]'``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from ftfast.models.exporting import atomic_folder
from ftfast.models.tiny import builtin_model_folder

GENERATOR_NAME = "tiny-diffusion"
"""Name that stands for the shipped generator wherever a pipeline is named."""

PIPELINE_CLASS = "TinyDiffusionPipeline"
"""Class name in ``model_index.json`` of a folder that only :class:`TinyDiffusionPipeline` loads."""

IMAGE_SIZE = 32
"""Height and width of the images."""

TEXT_MODEL = "tiny-clip-v1"
"""Whose text tower reads the prompts."""

TEXT_WIDTH = 256
"""Width of the text features."""

HANDS = 3
"""Drawing hands: those of the built-in set, in its order."""

CONDITION_WIDTH = TEXT_WIDTH + HANDS
"""Width of a condition: text features, then the hand."""

_HAND_SCALE = 4.0  # makes one of three entries about as loud as the 256 of the text

FOLD = 2
"""Pixels per side that become channels of the network."""

SKETCH_SIZE = IMAGE_SIZE // FOLD
"""Height and width of the sketch: the grid of the network."""

RESIDUAL_SCALE = 0.3
"""Standard deviation of drawing minus enlarged sketch, on the training drawings, about; residuals are divided by it."""

SKETCH_WIDTH = 896
"""Width of the layer between text features and sketch."""

_SHEET_NAMES = (
    "grinning face",
    "red heart",
    "dog face",
    "cat",
    "fish",
    "red apple",
    "pizza",
    "hot beverage",
    "automobile",
    "airplane",
    "rocket",
    "sun",
    "soccer ball",
    "guitar",
    "house",
    "key",
    "hammer",
    "laptop",
    "flag of France",
    "flag of Japan",
    "flag of Brazil",
    "red circle",
    "blue square",
    "umbrella",
)


def generator_folder() -> Path:
    """Return the folder of the shipped generator; it need not exist in a checkout without weights."""
    return Path(__file__).parent / "weights" / GENERATOR_NAME


class SketchUNet(UNet2DConditionModel):
    """The denoiser: a small U-Net that also sees a sketch of what the prompt means. Made by :func:`build_unet`."""

    # diffusers reads the names of a configuration's entries off the signature.
    @wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.sketch = nn.Sequential(
            nn.Linear(CONDITION_WIDTH, SKETCH_WIDTH), nn.SiLU(), nn.Linear(SKETCH_WIDTH, 3 * SKETCH_SIZE**2)
        )

    def paint(self, condition: Tensor) -> Tensor:
        """Return the sketch (B, 3, 16, 16), about in [-1, 1], of conditions (B, 259)."""
        return self.sketch(condition).view(-1, 3, SKETCH_SIZE, SKETCH_SIZE)

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, sketch: Tensor, condition: Tensor
    ) -> Tensor:
        """Return the velocity.

        Args:
            sample: Folded noisy residuals (B, 12, 16, 16).
            timestep: Steps of the schedule, int64 (B,) or one for all.
            sketch: From :meth:`paint`, (B, 3, 16, 16).
            condition: From :func:`conditions`, (B, 259); zeros in the first 256 entries: no prompt.

        Returns:
            (B, 12, 16, 16).
        """
        both = torch.cat([sample, sketch], dim=1)
        return super().forward(both, timestep, None, class_labels=condition, return_dict=False)[0]


def build_unet() -> SketchUNet:
    """Build the untrained network, about 3 million parameters; weights follow torch's global seed."""
    return SketchUNet(
        sample_size=IMAGE_SIZE // FOLD,
        in_channels=3 * FOLD**2 + 3,
        out_channels=3 * FOLD**2,
        block_out_channels=(64, 96),
        layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=32,
        resnet_time_scale_shift="scale_shift",
        time_embedding_dim=256,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=CONDITION_WIDTH,
        cross_attention_dim=TEXT_WIDTH,  # unused: no block attends to tokens
    )


def build_scheduler() -> DDIMScheduler:
    """Build the noise schedule: cosine, 1000 steps, velocity prediction, no signal at the last step."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,  # residuals have no fixed range; images are clipped in the end
    )


def fold(images: Tensor) -> Tensor:
    """Move each 2x2 square of pixels into channels: (B, 3, 32, 32) to (B, 12, 16, 16)."""
    return F.pixel_unshuffle(images, FOLD)


def enlarge(sketch: Tensor) -> Tensor:
    """Enlarge sketches (B, 3, 16, 16) to the size of images."""
    return F.interpolate(sketch, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)


def unfold(channels: Tensor) -> Tensor:
    """Undo :func:`fold`."""
    return F.pixel_shuffle(channels, FOLD)


@lru_cache(maxsize=1)
def _text_model() -> tuple[Any, Any]:
    import open_clip

    where = f"local-dir:{builtin_model_folder(TEXT_MODEL)}"
    model = open_clip.create_model(where)
    return model.eval().requires_grad_(False), open_clip.get_tokenizer(where)


@torch.no_grad()
def embed_prompts(prompts: Sequence[str]) -> Tensor:
    """Return the normalised text features of each prompt, times the root of their width.

    Args:
        prompts: N prompts. The empty prompt stands for "no prompt" and becomes zeros.

    Returns:
        float32 (N, 256) on the CPU; entries have about unit variance.
    """
    model, tokenizer = _text_model()
    features = torch.zeros(len(prompts), TEXT_WIDTH)
    filled = [i for i, prompt in enumerate(prompts) if prompt]
    for part in range(0, len(filled), 512):
        rows = filled[part : part + 512]
        tokens = tokenizer([prompts[i] for i in rows])
        features[rows] = model.encode_text(tokens, normalize=True) * TEXT_WIDTH**0.5
    return features


def conditions(texts: Tensor, hands: Tensor) -> Tensor:
    """Return what the network is told: text features and the drawing hand.

    Args:
        texts: From :func:`embed_prompts`, (B, 256).
        hands: int64 (B,) in 0..2.

    Returns:
        (B, 259), of the type of ``texts``.
    """
    return torch.cat([texts, F.one_hot(hands, HANDS).to(texts.dtype) * _HAND_SCALE], dim=1)


class TinyDiffusionPipeline(DiffusionPipeline):
    """Prompts to 32-pixel drawings; called like any text-to-image pipeline of diffusers.

    Args:
        unet: From :func:`build_unet`.
        scheduler: From :func:`build_scheduler`, or another scheduler for velocity prediction.
    """

    unet: Any
    scheduler: Any

    def __init__(self, unet: SketchUNet, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32, **_: Any) -> Any:
        """Load a folder that ``save_pretrained`` wrote; safetensors only, nothing is downloaded.

        Args:
            folder: The folder.
            torch_dtype: Arithmetic of the network.
        """
        local = {"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": False}
        unet = SketchUNet.from_pretrained(folder, subfolder="unet", torch_dtype=torch_dtype, **local)
        return cls(unet, DDIMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 10,
        guidance_scale: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw one image per prompt.

        Args:
            prompt: One prompt or N of them.
            num_inference_steps: DDIM steps.
            guidance_scale: Weight w of classifier-free guidance, v(none) + w (v(prompt) - v(none)), where both see the
                sketch; 1 turns it off and halves the time.
            generator: Source of the hand and the initial noise: one for all images, or one per image. DDIM adds no
                further noise.
            output_type: "pil" or "pt" (float (N, 3, 32, 32) in [0, 1]).

        Returns:
            N images; the same prompt and generator state give the same image.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        device, dtype = self.unet.device, self.unet.dtype
        hands, noise = self._draws(len(prompts), generator)
        texts, sample = embed_prompts(prompts), noise.to(device, dtype)
        condition = conditions(texts, hands).to(device, dtype)
        sketch = self.unet.paint(condition)
        base = enlarge(sketch.float())
        guided = guidance_scale != 1.0
        if guided:
            condition = torch.cat([condition, conditions(torch.zeros_like(texts), hands).to(device, dtype)])
            sketch = torch.cat([sketch, sketch])
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for step in self.progress_bar(self.scheduler.timesteps):
            batch = torch.cat([sample, sample]) if guided else sample
            velocity = self.unet(batch, step, sketch, condition)
            if guided:
                with_prompt, without = velocity.chunk(2)
                velocity = without + guidance_scale * (with_prompt - without)
            sample = self.scheduler.step(velocity.float(), step, sample.float(), return_dict=False)[0].to(dtype)
        images = ((base + RESIDUAL_SCALE * unfold(sample.float())) / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return ImagePipelineOutput(images=images)
        return ImagePipelineOutput(images=self.numpy_to_pil(images.permute(0, 2, 3, 1).cpu().numpy()))

    def _draws(
        self, count: int, generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> tuple[Tensor, Tensor]:
        """Draw hands (N,) and initial noise (N, 12, 16, 16), image by image; results lie on the CPU."""
        if generator is None or isinstance(generator, torch.Generator):
            each: list[torch.Generator | None] = [generator] * count
        else:
            each = list(generator)
        if len(each) != count:
            raise ValueError(f"{len(each)} generators for {count} prompts; give one, or one per prompt.")
        hands, noise = [], []
        for one in each:
            device = "cpu" if one is None else one.device
            hands.append(torch.randint(HANDS, (1,), generator=one, device=device).cpu())
            shape = (1, 3 * FOLD**2, SKETCH_SIZE, SKETCH_SIZE)
            noise.append(torch.randn(shape, generator=one, device=device).cpu())
        return torch.cat(hands), torch.cat(noise)


def sample_sheet(unet: Any, path: Path, names: Sequence[str] = (), columns: int = 8) -> Path:
    """Draw names with the generator and write one PNG, three times enlarged.

    Args:
        unet: The network.
        path: Target.
        names: What to draw; empty: two dozen common things.
        columns: Images in a row.
    """
    names = names or _SHEET_NAMES
    pipeline = TinyDiffusionPipeline(unet, build_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    random = [torch.Generator().manual_seed(seed) for seed in range(len(names))]
    images = pipeline([f"a drawing of a {name}." for name in names], generator=random).images
    side, rows = 3 * IMAGE_SIZE, -(-len(names) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for i, image in enumerate(images):
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (i % columns * side, i // columns * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def save_pipeline(folder: Path, unet: Any, card: str) -> Path:
    """Write the pipeline, weights in float16 safetensors, atomically.

    Args:
        folder: Target; replaced as a whole.
        unet: The network; it is not changed.
        card: Text of README.md.
    """
    pipeline = TinyDiffusionPipeline(copy.deepcopy(unet).half(), build_scheduler())
    with atomic_folder(folder) as work:
        pipeline.save_pretrained(work, safe_serialization=True)
        (work / "README.md").write_text(card, encoding="utf-8")
        for path in work.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors makes it private; these are part of a package
    return folder
