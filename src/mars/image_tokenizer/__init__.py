"""Images to codes and back: our own VQ-GAN."""
