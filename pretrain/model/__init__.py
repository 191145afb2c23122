"""Tensors in, tensors out: tubelets, positions, attention, encoders, masks and the masked autoencoder.

Shape letters, used in every docstring of this package:

    B   batch (clips)                 Tt Ht Wt   token grid: slots, rows, columns
    C   colour channels               N          tokens of a clip, Tt * Ht * Wt
    T   frames                        Nv Nm      visible tokens, masked tokens
    H W height and width in pixels    S          visible slots
    D   width of the model            Hd         heads
    P   values in a tubelet, t * h * w * C

Token n stands in slot n div (Ht * Wt), row (n mod Ht * Wt) div Wt, column n mod Wt.
"""
