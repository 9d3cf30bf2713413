"""Data to train on and to measure on: one road from a name to samples, which then forks.

`sources` opens data by name, each kind by an opener of its own; `splits` picks the split, `rows`
reads it, and `columns` finds text, images and classes. `windows` cuts running text and `images`
decodes images, for both sides. Training takes items by random draw (`text_data`, `image_data`,
`draws`, `augmentation`); measuring takes batches with labels for a checkpoint (`batches`).
"""
