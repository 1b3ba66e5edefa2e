"""The `cmfg` command line; installed as `cmfg_dgl.cli`."""
