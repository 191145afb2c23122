"""Weights of other implementations by our names, and ours by theirs: pure functions on state dicts.

    source        a state dict that is read strictly: no key unused, none missing
    parts         what the layouts share: blocks, attention, embeddings, sizes
    layouts       which layout a state dict has, and its conversion, checked against our encoder
    videomae      Hugging Face VideoMAE, and the authors' own layout (MCG-NJU)
    videomae_out  our models in Hugging Face's VideoMAE layout
    vivit         Hugging Face ViViT
    image         timm's ViT and MAE (facebookresearch/mae) for images
    xclip         the vision part of Hugging Face X-CLIP
    inflation     from images to clips; other frame counts and sizes

Every conversion is made of differentiable operations, so that gradients go through it in the tests.
"""
