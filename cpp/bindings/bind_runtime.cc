#include <pybind11/stl.h>

#include <exception>
#include <memory>
#include <system_error>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/runtime.h"
#include "dispatch/cpu_features.h"
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
      .def(py::init([](int threads, bool pin, std::vector<int> cpus) {
             DetectFeatures();  // must run before threads exist
             return std::make_shared<Runtime>(
                 PinnedPool::Options{.threads = threads, .pin = pin, .cpus = std::move(cpus)});
           }),
           py::arg("threads"), py::arg("pin"), py::arg("cpus"))
      .def("close", &Runtime::Close, py::call_guard<py::gil_scoped_release>());
}

}  // namespace cpumoe
