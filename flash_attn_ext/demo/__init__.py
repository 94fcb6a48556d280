"""`python -m flash_attn_ext demo`: our attention beside torch's softmax attention, on real input.

parity.py compares them at growing length, train.py trains a GPT with each, pretrained.py swaps ours into a pretrained
sentence transformer. run.py is the command.
"""
