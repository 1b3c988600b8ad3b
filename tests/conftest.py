import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when these packages are first imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.setdefault("WANDB_SILENT", "true")

import torch

torch.set_num_threads(1)
