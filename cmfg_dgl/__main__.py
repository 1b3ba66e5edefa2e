"""`python -m cmfg_dgl`: the command line where `cmfg` is not on the path."""

from cmfg_dgl.cli.main import main

if __name__ == "__main__":
    main()
