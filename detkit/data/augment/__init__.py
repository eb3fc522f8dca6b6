"""Training augmentation: mosaic, affine, copy-paste, mixup and per-image transforms."""
