"""The options of every method, one file per family; `config.CONFIGS` maps the names typed after `--method` to them."""
