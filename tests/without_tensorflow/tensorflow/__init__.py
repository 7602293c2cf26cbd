raise ImportError("TensorFlow is not a dependency: nothing may need it")
