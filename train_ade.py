"""Train steps of a class-incremental task on ADE20K.

    python train_ade.py --task_name 100-50 --task_step all
    python train_ade.py --task_name 100-50 --task_step 1 --method finetune --name mine --lr 0.0002

Without a hyper-parameter a method trains by its recipe (configs/recipes), as its authors did. Every
flag overrides the config key that it names; see README.md.
"""

from utils import interrupt, threads

if __name__ == "__main__":
    interrupt.end_at_once()  # on a signal, also while the rest is being imported
    threads.spin_briefly()
    from trainer.steps import settings_help, step_configs
    from utils.errors import one_sentence_errors
    from utils.parse_config import ConfigParser

    with one_sentence_errors():
        default = "configs/config_ade.json"
        config = ConfigParser.from_args("train", default, __doc__, settings_help=settings_help)
        steps = step_configs(config)
        from trainer.run import run  # torch is imported only where there is work for it

        run(*steps)
