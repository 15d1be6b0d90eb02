"""open_clip's stock trainer with the fused losses; takes the trainer's own arguments.

Run: torchrun --nproc-per-node 2 examples/open_clip_trainer.py --train-data pairs.csv --csv-separator , \
         --model ViT-B-16 --pretrained openai --local-loss --gather-with-grad
"""

from __future__ import annotations

import sys

from open_clip_train.main import main

from ftfast.integrations.open_clip import patch

if __name__ == "__main__":
    with patch(ring="--ring" in sys.argv):
        main([argument for argument in sys.argv[1:] if argument != "--ring"])
