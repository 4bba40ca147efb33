"""Train steps of a class-incremental task on ADE20K.

    python train_ade.py --task_name 100-50 --task_step all
    python train_ade.py --task_name 100-50 --task_step 1 --method finetune --name mine --lr 0.0002

Without a hyper-parameter a method trains by its recipe (configs/recipes), as its authors did. Every
flag overrides the config key that it names; see README.md.
"""

from trainer.entry import main

if __name__ == "__main__":
    main("train", "configs/config_ade.json", __doc__)
