// Sweeps over parameters as Python objects. Apart from bindings.cpp the only part of the core that knows Python.
#pragma once

#include <pybind11/pybind11.h>

namespace fastconfig {

// Adds the classes Sweep and Copies to the module; fastconfig/gradients/sweep.py says what each method means.
void add_sweeps(pybind11::module_& module);

}  // namespace fastconfig
