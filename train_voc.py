"""Train one step of a class-incremental task on PASCAL VOC 2012.

    python train_voc.py --task_name 15-1 --task_step 0 --name DKD --lr 0.001 --bs 32 --pos_weight 2
    python train_voc.py --task_name 15-1 --task_step 1 --name DKD --lr 0.0001 --bs 32 --freeze_bn

Every flag overrides the config key that it names; see README.md.
"""

from utils import interrupt

if __name__ == "__main__":
    interrupt.end_at_once()  # on a signal, also while the rest is being imported
    from utils.misc import one_sentence_errors
    from utils.parse_config import ConfigParser

    with one_sentence_errors():
        config = ConfigParser.from_args("train", "configs/config_voc.json", __doc__)
        from trainer.run import run  # torch is imported only for arguments that are good

        run(config)
