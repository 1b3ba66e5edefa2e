"""Images, captions, labels and splits, read from where they lie."""
