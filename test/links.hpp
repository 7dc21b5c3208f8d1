// links.hpp - two hosts with two links between them, each in a network namespace, and addresses.
#pragma once

#include <linux/if_addr.h>
#include <linux/veth.h>

#include "network.hpp"

namespace test {

// A request to the kernel's routing, rtnetlink(7).
class Request {
public:
    Request(int type, int flags = 0) {
        nlmsghdr header{};
        header.nlmsg_type = uint16_t(type);
        header.nlmsg_flags = uint16_t(NLM_F_REQUEST | NLM_F_ACK | flags);
        add(header);
    }
    template <class Struct>
    void add(const Struct& what) {
        add(&what, sizeof what);
    }
    void attribute(int type, const void* data, size_t size) {
        const size_t at = begin(type);
        add(data, size);
        end(at);
    }
    void attribute(int type, const std::string& text) {
        attribute(type, text.c_str(), text.size() + 1);
    }
    void attribute(int type, int number) { attribute(type, &number, sizeof number); }
    size_t begin(int type) {  // of an attribute that holds others
        const size_t at = size_;
        rtattr head{};
        head.rta_type = uint16_t(type);
        add(head);
        return at;
    }
    void end(size_t at) {
        const uint16_t length = uint16_t(size_ - at);
        memcpy(octets_ + at, &length, sizeof length);
        size_ = (size_ + 3) / 4 * 4;
    }
    void send(const std::string& what) {
        const uint32_t length = uint32_t(size_);
        memcpy(octets_, &length, sizeof length);
        struct {
            nlmsghdr header;
            nlmsgerr result;
            uint8_t rest[4096];
        } reply{};
        const int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
        CHECK_EQ(::send(fd, octets_, size_, 0), ssize_t(size_));
        CHECK(recv(fd, &reply, sizeof reply, 0) > 0);
        close(fd);
        CHECK_WHY(reply.result.error == 0, what + ": " + strerror(-reply.result.error));
    }

private:
    void add(const void* what, size_t size) {
        memcpy(octets_ + size_, what, size);
        size_ += size;
    }
    uint8_t octets_[1024]{};
    size_t size_ = 0;
};

// A pair of devices: what goes into one comes out of the other, which is in the namespace `other`.
inline void add_link(const std::string& here, const std::string& there, int other) {
    Request r(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL);
    r.add(ifinfomsg{});
    r.attribute(IFLA_IFNAME, here);
    const size_t info = r.begin(IFLA_LINKINFO);
    r.attribute(IFLA_INFO_KIND, "veth", 4);
    const size_t data = r.begin(IFLA_INFO_DATA), peer = r.begin(VETH_INFO_PEER);
    r.add(ifinfomsg{});
    r.attribute(IFLA_IFNAME, there);
    r.attribute(IFLA_NET_NS_FD, other);
    r.end(peer);
    r.end(data);
    r.end(info);
    r.send("link " + here);
}

inline void set_up(const std::string& device) {
    Request r(RTM_NEWLINK);
    ifinfomsg message{};
    message.ifi_index = int(if_nametoindex(device.c_str()));
    message.ifi_flags = message.ifi_change = IFF_UP;
    r.add(message);
    r.send(device + " up");
}

inline std::pair<int, Octets> address_octets(const std::string& address) {
    const int family = contains(address, ":") ? AF_INET6 : AF_INET;
    Octets octets(family == AF_INET6 ? 16 : 4);
    CHECK_EQ(inet_pton(family, address.c_str(), octets.data()), 1);
    return {family, octets};
}

// `checked`: an IPv6 address is tentative until nobody else was found to have it, RFC 4862 5.4.
inline void add_address(const std::string& device, const std::string& address, int bits,
                        bool checked = false) {
    const auto [family, octets] = address_octets(address);
    Request r(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL);
    ifaddrmsg message{};
    message.ifa_family = uint8_t(family);
    message.ifa_prefixlen = uint8_t(bits);
    message.ifa_flags = uint8_t(family == AF_INET6 && !checked ? IFA_F_NODAD : 0);
    message.ifa_index = if_nametoindex(device.c_str());
    r.add(message);
    r.attribute(IFA_LOCAL, octets.data(), octets.size());
    r.attribute(IFA_ADDRESS, octets.data(), octets.size());
    r.send("address " + address);
}

inline void add_route(const std::string& to, const std::string& gateway) {
    const auto [family, octets] = address_octets(to);
    const Octets through = address_octets(gateway).second;
    Request r(RTM_NEWROUTE, NLM_F_CREATE);
    rtmsg message{};
    message.rtm_family = uint8_t(family);
    message.rtm_dst_len = uint8_t(8 * octets.size());
    message.rtm_table = RT_TABLE_MAIN;
    message.rtm_protocol = RTPROT_STATIC;
    message.rtm_scope = RT_SCOPE_UNIVERSE;
    message.rtm_type = RTN_UNICAST;
    r.add(message);
    r.attribute(RTA_DST, octets.data(), octets.size());
    r.attribute(RTA_GATEWAY, through.data(), through.size());
    r.send("route to " + to);
}

// Two hosts. On the link 0 they are 10.9.0.1 and .2, fd00:9:0::1 and ::2; on the link 1 10.9.1.1
// and .2, fd00:9:1::1 and ::2. The second is 10.9.7.7 and fd00:9:7::7, too, which the first reaches
// by the link 1.
class TwoHosts {
public:
    TwoHosts() {
        first_ = make();
        second_ = make();
        if (first_ < 0 || second_ < 0) throw check::Skip("a network namespace needs root");
        for (const std::string link : {"0", "1"}) add_link("b" + link, "a" + link, first_);
        configure("b", "2");
        add_address("lo", "10.9.7.7", 32);
        add_address("lo", "fd00:9:7::7", 128);
        be_first();
        configure("a", "1");
        add_route("10.9.7.7", "10.9.1.2");
        add_route("fd00:9:7::7", "fd00:9:1::2");
    }
    ~TwoHosts() {
        close(first_);
        close(second_);
    }
    // Sockets, threads and processes of this thread are of that host from now on.
    void be_first() { CHECK_EQ(setns(first_, CLONE_NEWNET), 0); }
    void be_second() { CHECK_EQ(setns(second_, CLONE_NEWNET), 0); }

private:
    static int make() {
        return own_network() ? open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC) : -1;
    }
    static void configure(const std::string& device, const std::string& number) {
        for (const std::string link : {"0", "1"}) {
            const std::string name = device + link;
            set_network("ipv4/conf/" + name + "/rp_filter", "0");
            set_network("ipv4/conf/" + name + "/arp_ignore", "1");
            set_network("ipv6/conf/" + name + "/accept_dad", "0");
            set_up(name);
            add_address(name, "10.9." + link + "." + number, 24);
            add_address(name, "fd00:9:" + link + "::" + number, 64);
        }
        set_network("ipv4/conf/all/rp_filter", "0");
    }
    int first_ = -1, second_ = -1;
};

}  // namespace test
