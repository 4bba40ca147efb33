"""Train steps of a class-incremental task on PASCAL VOC 2012.

    python train_voc.py --task_name 15-1 --task_step all
    python train_voc.py --task_name 15-1 --task_step 1 --method finetune --name mine --lr 0.0002

Without a hyper-parameter a method trains by its recipe (configs/recipes), as its authors did. Every
flag overrides the config key that it names; see README.md.
"""

from trainer.entry import main

if __name__ == "__main__":
    main("train", "configs/config_voc.json", __doc__)
