"""The feature store on the disk: shards, their manifests, and how they are built and read."""
