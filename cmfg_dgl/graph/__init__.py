"""The cross-modal feature graph: relations, topologies and the batched builder."""
