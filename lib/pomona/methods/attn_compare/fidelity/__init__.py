"""How far each kernel's attention lies from softmax's at the heads of a real model, and what of it learning mends."""
