"""Train one step of a class-incremental task on ADE20K.

    python train_ade.py --task_name 100-50 --task_step 0 --name DKD --lr 0.0025 --bs 24
    python train_ade.py --task_name 100-50 --task_step 1 --name DKD --lr 0.00025 --bs 24 --freeze_bn

Every flag overrides the config key that it names; see README.md.
"""

from utils import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()  # on a signal, also while the rest is being imported
    from utils.misc import one_sentence_errors
    from utils.parse_config import ConfigParser

    with one_sentence_errors():
        config = ConfigParser.from_args("train", "configs/config_ade.json", __doc__)
        from trainer.run import run  # torch is imported only for arguments that are good

        run(config)
