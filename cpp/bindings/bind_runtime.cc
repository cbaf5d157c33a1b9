#include <pybind11/stl.h>

#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/submitted_call.h"
#include "engine/placement.h"
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
      .def_readonly("node", &CpuLocation::node)
      .def_readonly("l3", &CpuLocation::l3);
  py::class_<NumaNode>(m, "NumaNode")
      .def_readonly("id", &NumaNode::id)
      .def_readonly("cpus", &NumaNode::cpus)
      .def_readonly("cores", &NumaNode::cores)
      .def_readonly("memory_bytes", &NumaNode::memory_bytes)
      .def_readonly("memory_node", &NumaNode::memory_node);
  py::class_<Topology>(m, "Topology")
      .def_readonly("cpus", &Topology::cpus)
      .def_readonly("cores", &Topology::cores)
      .def_readonly("nodes", &Topology::nodes)
      .def_readonly("other_nodes", &Topology::other_nodes)
      .def_readonly("l3_groups", &Topology::l3_groups)
      .def_readonly("quota", &Topology::quota)
      .def_readonly("default_threads", &Topology::default_threads);
  m.def(
      "topology",
      [](const std::string& sysfs, const std::string& proc, std::optional<std::vector<int>> cpus) {
        return ReadTopology({.sysfs = sysfs,
                             .proc = proc,
                             .affinity = cpus ? *std::move(cpus) : ProcessAffinity()});
      },
      py::kw_only(), py::arg("sysfs") = "/sys", py::arg("proc") = "/proc",
      py::arg("affinity") = py::none(),
      "The CPUs and NUMA nodes that this process may use, or those of a made-up machine.");

  py::class_<MemoryNode>(m, "MemoryNode")
      .def_readonly("id", &MemoryNode::id)
      .def_readonly("threads", &MemoryNode::threads);
  py::class_<Placement>(m, "Placement")
      .def_property_readonly("node", [](const Placement& p) { return p.share.node; })
      .def_property_readonly("nbytes", [](const Placement& p) { return p.share.bytes; })
      .def_property_readonly("bound", [](const Placement& p) { return p.share.bound; })
      .def_readonly("pages", &Placement::pages)
      .def_readonly("local", &Placement::local);
  py::class_<NodeThreads>(m, "NodeThreads")
      .def(py::init([](int id, int threads, std::vector<int> cpus, bool one_cpu_each) {
             return NodeThreads{.memory = {.id = id, .threads = threads},
                                .cpus = std::move(cpus),
                                .one_cpu_each = one_cpu_each};
           }),
           py::kw_only(), py::arg("id"), py::arg("threads"), py::arg("cpus"),
           py::arg("one_cpu_each"));

  py::class_<Runtime, std::shared_ptr<Runtime>>(m, "Runtime")
      .def(py::init([](int threads, std::vector<int> cpus, bool callers_compute,
                       std::vector<NodeThreads> nodes) {
             return Runtime::Create(
                 {.node = {.threads = threads, .cpus = std::move(cpus), .nodes = std::move(nodes)},
                  .callers_compute = callers_compute});
           }),
           py::kw_only(), py::arg("threads"), py::arg("cpus"), py::arg("callers_compute") = true,
           py::arg("nodes") = std::vector<NodeThreads>())
      .def_property_readonly("nodes", &Runtime::nodes,
                             "The NUMA nodes of the threads; none: the runtime does not look at "
                             "nodes.")
      .def("close", &Runtime::Close, py::call_guard<py::gil_scoped_release>());

  py::class_<SubmittedCall>(m, "SubmittedCall")
      .def("done", &SubmittedCall::Done)
      .def("wait", &SubmittedCall::Wait, py::call_guard<py::gil_scoped_release>())
      .def("wait_for", &SubmittedCall::WaitFor, py::arg("seconds"),
           py::call_guard<py::gil_scoped_release>());
}

}  // namespace cpumoe
