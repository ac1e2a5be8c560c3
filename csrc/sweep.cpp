#include "sweep.hpp"

#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace fastconfig {
namespace {

// Attributes of a tensor, as CPython looks them up: interned once, and never freed.
struct Names {
    PyObject* grad = PyUnicode_InternFromString("grad");
    PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* layout = PyUnicode_InternFromString("layout");
    PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
    PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
};

const Names& names() {
    static const Names interned;
    return interned;
}

py::object attribute(PyObject* tensor, PyObject* name) {
    PyObject* value = PyObject_GetAttr(tensor, name);
    if (value == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
}

py::object call(PyObject* tensor, PyObject* name) {
    PyObject* value = PyObject_CallMethodNoArgs(tensor, name);
    if (value == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
}

void set_grad(PyObject* parameter, PyObject* grad) {
    if (PyObject_SetAttr(parameter, names().grad, grad) < 0) throw py::error_already_set();
}

std::uintptr_t address_of(PyObject* tensor) {
    const std::size_t address = PyLong_AsSize_t(call(tensor, names().data_ptr).ptr());
    if (address == static_cast<std::size_t>(-1) && PyErr_Occurred()) throw py::error_already_set();
    return address;
}

class Sweep {
 public:
    explicit Sweep(py::tuple parameters) : parameters_(std::move(parameters)) {
        for (const py::handle parameter : parameters_) {
            addresses_.push_back(address_of(parameter.ptr()));
            shapes_.push_back(attribute(parameter.ptr(), names().shape));
            dtypes_.push_back(attribute(parameter.ptr(), names().dtype));
        }
    }

    bool lies_where_it_did() const {
        for (size_t i = 0; i < addresses_.size(); ++i)
            if (address_of(at(i)) != addresses_[i]) return false;
        return true;
    }

    bool is_unchanged() const {
        if (!lies_where_it_did()) return false;
        for (size_t i = 0; i < addresses_.size(); ++i) {
            PyObject* parameter = at(i);
            if (attribute(parameter, names().dtype).ptr() != dtypes_[i].ptr()) return false;
            const int same =
                PyObject_RichCompareBool(attribute(parameter, names().shape).ptr(), shapes_[i].ptr(), Py_EQ);
            if (same < 0) throw py::error_already_set();
            if (same == 0) return false;
        }
        return true;
    }

    std::pair<py::list, py::tuple> take() const {
        const size_t count = addresses_.size();
        py::list grads(count);
        py::tuple flags(count);
        for (size_t i = 0; i < count; ++i) {
            py::object grad = attribute(at(i), names().grad);
            const bool has = !grad.is_none();
            if (has) set_grad(at(i), Py_None);
            flags[i] = py::bool_(has);
            grads[i] = std::move(grad);
        }
        return {std::move(grads), std::move(flags)};
    }

    void give(const py::list& grads, bool are_none) const {
        for (size_t i = 0; i < addresses_.size(); ++i) {
            PyObject* grad = PyList_GET_ITEM(grads.ptr(), i);
            if (grad != Py_None || !are_none) set_grad(at(i), grad);
        }
    }

    // The first alias that no longer lies where its view does, or -1; up to there it is shown.
    std::int64_t show(const py::list& aliases, const std::vector<std::uintptr_t>& addresses, const py::tuple& flags,
                      bool hides, std::int64_t begin) const {
        for (size_t i = begin; i < addresses_.size(); ++i) {
            if (PyTuple_GET_ITEM(flags.ptr(), i) != Py_True) {
                if (hides) set_grad(at(i), Py_None);
                continue;
            }
            PyObject* alias = PyList_GET_ITEM(aliases.ptr(), i);
            if (address_of(alias) != addresses[i] || attribute(alias, names().requires_grad).ptr() == Py_True) return i;
            set_grad(at(i), alias);
        }
        return -1;
    }

 private:
    PyObject* at(size_t index) const { return PyTuple_GET_ITEM(parameters_.ptr(), index); }

    py::tuple parameters_;
    std::vector<std::uintptr_t> addresses_;
    std::vector<py::object> shapes_, dtypes_;
};

// Gradients on the CPU that are to be copied whole: each with its place among the parameters, and where it goes.
class Copies {
 public:
    struct Copy {
        std::int64_t position;
        std::uintptr_t to;
        std::size_t bytes;
    };

    Copies(const std::vector<std::tuple<std::int64_t, std::uintptr_t, std::size_t>>& copies, py::object dtype,
           py::object layout)
        : dtype_(std::move(dtype)), layout_(std::move(layout)) {
        for (const auto& [position, to, bytes] : copies) copies_.push_back({position, to, bytes});
    }

    // The positions of those that lie otherwise, and are left to the caller.
    py::list copy(const py::list& grads) const {
        py::list left;
        for (const Copy& copy : copies_) {
            PyObject* grad = PyList_GET_ITEM(grads.ptr(), copy.position);
            if (attribute(grad, names().layout).ptr() != layout_.ptr() ||
                attribute(grad, names().dtype).ptr() != dtype_.ptr() ||
                call(grad, names().is_contiguous).ptr() != Py_True) {
                left.append(copy.position);
                continue;
            }
            // Whoever assigned a gradient may have made it of the row's own memory.
            if (copy.bytes == 0) continue;  // an empty gradient may have no address at all
            const std::uintptr_t address = address_of(grad);
            if (address == 0)
                throw std::runtime_error("the gradient of parameter " + std::to_string(copy.position) +
                                         " has no memory: its storage was emptied before it was recorded");
            std::memmove(reinterpret_cast<void*>(copy.to), reinterpret_cast<const void*>(address), copy.bytes);
        }
        return left;
    }

 private:
    std::vector<Copy> copies_;
    py::object dtype_, layout_;
};

}  // namespace

void add_sweeps(py::module_& module) {
    py::class_<Sweep>(module, "Sweep")
        .def(py::init<py::tuple>())
        .def("lies_where_it_did", &Sweep::lies_where_it_did)
        .def("is_unchanged", &Sweep::is_unchanged)
        .def("take", &Sweep::take)
        .def("give", &Sweep::give)
        .def("show", &Sweep::show);
    py::class_<Copies>(module, "Copies")
        .def(py::init<const std::vector<std::tuple<std::int64_t, std::uintptr_t, std::size_t>>&, py::object,
                      py::object>())
        .def("copy", &Copies::copy);
}

}  // namespace fastconfig
