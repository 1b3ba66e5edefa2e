"""The recipes that ship with cmfg-dgl; installed as `cmfg_dgl.configs`."""
