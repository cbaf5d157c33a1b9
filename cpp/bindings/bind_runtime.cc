#include <pybind11/stl.h>

#include <exception>
#include <memory>
#include <system_error>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/submitted_call.h"
#include "engine/runtime.h"
#include "threading/topology.h"

namespace py = pybind11;

namespace cpumoe {

void BindRuntime(py::module_& m) {
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const std::system_error& e) {
      PyErr_SetString(PyExc_OSError, e.what());
    }
  });

  py::class_<CpuLocation>(m, "CpuLocation")
      .def_readonly("cpu", &CpuLocation::cpu)
      .def_readonly("core", &CpuLocation::core)
      .def_readonly("package", &CpuLocation::package)
      .def_readonly("node", &CpuLocation::node);
  py::class_<NumaNode>(m, "NumaNode")
      .def_readonly("id", &NumaNode::id)
      .def_readonly("cpus", &NumaNode::cpus);
  py::class_<Topology>(m, "Topology")
      .def_readonly("cpus", &Topology::cpus)
      .def_readonly("cores", &Topology::cores)
      .def_readonly("nodes", &Topology::nodes)
      .def_readonly("quota", &Topology::quota)
      .def_readonly("default_threads", &Topology::default_threads);
  m.def("topology", [] { return ReadTopology(); }, "The CPUs that this process may use.");

  py::class_<Runtime, std::shared_ptr<Runtime>>(m, "Runtime")
      .def(py::init([](int threads, std::vector<int> cpus, bool callers_compute) {
             return Runtime::Create({.node = {.threads = threads, .cpus = std::move(cpus)},
                                     .callers_compute = callers_compute});
           }),
           py::kw_only(), py::arg("threads"), py::arg("cpus"), py::arg("callers_compute") = true)
      .def("close", &Runtime::Close, py::call_guard<py::gil_scoped_release>());

  py::class_<SubmittedCall>(m, "SubmittedCall")
      .def("done", &SubmittedCall::Done)
      .def("wait", &SubmittedCall::Wait, py::call_guard<py::gil_scoped_release>())
      .def("wait_for", &SubmittedCall::WaitFor, py::arg("seconds"),
           py::call_guard<py::gil_scoped_release>());
}

}  // namespace cpumoe
