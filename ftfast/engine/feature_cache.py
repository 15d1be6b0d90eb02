"""Teacher features on disk: the pretrained model's image embeddings in the evaluation view, by image index."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.data import ImageDataset, iterate_once
from ftfast.data.builtin import cache_root
from ftfast.models.loading import LoadedModel


@torch.no_grad()
def cached_image_features(
    loaded: LoadedModel,
    dataset: ImageDataset,
    cache_dir: Path | None = None,
    *,
    batch_size: int = 256,
    workers: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Embed every image of ``dataset`` once with the evaluation transform, or read the result of an earlier run.

    The file is keyed by the weights, the preprocessing and the data, so a changed image list or model never meets a
    stale cache. INFUSING (methods A2) looks teacher embeddings up by image index: constant per image, free of
    augmentation.

    Args:
        loaded: The teacher, with its pretrained weights.
        dataset: Images in their own order.
        cache_dir: Folder of the cache; None: ``$FTFAST_CACHE`` or ``~/.cache/ftfast``.
        batch_size: Images per forward pass.
        workers: Decoding processes.
        on_progress: Called with (done, total).

    Returns:
        (N, D) float32 rows of unit length, on the CPU. Rows of images that cannot be decoded are zero.
    """
    from safetensors.torch import load_file, save_file

    key = hashlib.sha256(
        json.dumps(
            [loaded.fingerprint, dataset.fingerprint, loaded.preprocess_config], sort_keys=True, default=str
        ).encode()
    ).hexdigest()[:32]
    path = (cache_dir or cache_root()) / "features" / f"{key}.safetensors"
    if path.is_file():
        features = load_file(path)["image_features"]
        if features.shape == (len(dataset), loaded.embed_dim):
            return features
    model = loaded.model
    device = next(model.parameters()).device
    features = torch.zeros(len(dataset), loaded.embed_dim)
    training = model.training
    model.eval()
    try:
        done = 0
        for batch in iterate_once(dataset, loaded.eval_transform, batch_size=batch_size, workers=workers):
            embedded = F.normalize(model.encode_image(batch.images.to(device)).float(), dim=-1, eps=1e-12)
            features[batch.indices] = embedded.cpu()
            done += len(batch.indices)
            if on_progress is not None:
                on_progress(done, len(dataset))
    finally:
        model.train(training)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    save_file({"image_features": features}, temporary)
    os.replace(temporary, path)
    return features
