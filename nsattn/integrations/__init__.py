"""Native Sparse Attention inside the models of other libraries; each module imports the library it is named after."""
