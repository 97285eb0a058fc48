"""The names of the files that are made anew beside the weights of a checkpoint."""

from __future__ import annotations

MANIFEST = "surgery.json"
CARD = "README.md"
FIGURE = "surgery_layers.png"
LOSS_FIGURE = "surgery_loss.png"
# In a folder of its own, where no runtime looks that loads every *.safetensors of a checkpoint.
UNDO = "undo/surgery_undo.safetensors"
GENERATED = (CARD, MANIFEST, FIGURE, LOSS_FIGURE, UNDO)
