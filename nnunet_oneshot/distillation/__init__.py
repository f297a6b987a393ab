"""Reconstruction-guided distillation: what a teacher of real images passes to a student of synthetic ones.

Vocabulary: the *teacher* reconstructs the real patch, the *student* segments the synthetic patch aligned with it. Their
*features* are the outputs of the decoder's stages; a *level* counts those from full resolution (level 0) downwards. The
*hint* is the loss that draws the student's features to the teacher's (arXiv 2408.03616).
"""
