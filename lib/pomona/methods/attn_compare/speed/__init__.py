"""From which length does linear attention pay? Time, memory and arithmetic against softmax, and where they cross."""
