"""Evaluate weights of a class-incremental task on PASCAL VOC 2012.

    python eval_voc.py -d 0 --test -r FOLDER/checkpoint-epoch60.pth

The config is read from beside the weights; see README.md.
"""

from trainer.entry import main

if __name__ == "__main__":
    main("eval", "configs/config_voc.json", __doc__)
