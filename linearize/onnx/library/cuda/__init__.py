"""Our Triton kernel for onnxruntime's CUDA provider: code compiled ahead of time, launched by CUDA's driver.

NEVER RUN ON A GPU. What is known without one: the kernel gives the oracle's numbers in Triton's
interpreter, also when the library calls it through a driver that stands in for CUDA's; it compiles for
sm_80, sm_90 and sm_100. Built by `linearize build-library --cuda FILE.onnx` for the nodes of that file;
without it, or for other nodes, the bodies run.

    op.cpp       the operators: which code, the launch on onnxruntime's stream
    kinds.py     what a file's nodes ask for, and the index of what was built
    build.py     the compilers
    loader.py    who gets the library
"""
