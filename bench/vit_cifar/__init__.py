"""A small ViT pretrained on CIFAR-10 by a script of the project; see README.md."""
