"""Evaluate weights of a class-incremental task on ADE20K.

    python eval_ade.py -d 0 --test -r FOLDER/checkpoint-epoch60.pth

The config is read from beside the weights; see README.md.
"""

from trainer.entry import main

if __name__ == "__main__":
    main("eval", "configs/config_ade.json", __doc__)
