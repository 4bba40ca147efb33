"""Evaluate weights of a class-incremental task on PASCAL VOC 2012.

    python eval_voc.py -d 0 --test -r FOLDER/checkpoint-epoch60.pth

The config is read from beside the weights; see README.md.
"""

from utils import interrupt, threads

if __name__ == "__main__":
    interrupt.end_at_once()  # on a signal, also while the rest is being imported
    threads.spin_briefly()
    from trainer.steps import step_configs
    from utils.errors import one_sentence_errors
    from utils.parse_config import ConfigParser

    with one_sentence_errors():
        config = ConfigParser.from_args("eval", "configs/config_voc.json", __doc__)
        steps = step_configs(config)
        from trainer.run import run  # torch is imported only where there is work for it

        run(*steps)
