"""The methods that CMFG is compared with, one file each, on the same frozen features."""
