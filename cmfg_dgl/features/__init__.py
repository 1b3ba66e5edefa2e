"""Backbone features of patches and tokens: the encoders and the feature store."""
