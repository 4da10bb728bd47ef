"""``python -m ds_optim``: the command line without an installed script, as the ``deepspeed`` launcher starts it."""

from ds_optim.cli import main

if __name__ == "__main__":
    main()
