"""Reconstruction-guided distillation from a teacher on real images to a student on synthetic images.

Vocabulary: the *teacher* reconstructs the real patch, the *student* segments the synthetic patch aligned with it. Their
*features* are the outputs of the decoder's stages; *levels* number the stages from full resolution (level 0) downwards.
The *hint* is the loss that pulls the student's features towards the teacher's (arXiv 2408.03616).
"""
