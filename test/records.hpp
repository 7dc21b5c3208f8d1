// records.hpp - TLS records made by hand, for a server that says what OpenSSL's would never say.
//
// OpenSSL shakes hands; then the keys are derived a second time here, and this end's records are
// made of any type and content, in any number. From then on OpenSSL must not write: each record has
// a number, and it would not know of those that were made here.
#pragma once

#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/ssl.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace test {

using Octets = std::vector<uint8_t>;

enum : uint8_t { ChangeCipherSpec = 20, Alert, Handshake, ApplicationData };  // RFC 8446 5.1
enum : uint8_t { HelloRequest = 0, NewSessionTicket = 4, KeyUpdate = 24 };    // RFC 8446 4

inline void put(Octets& to, uint64_t number, int octets) {
    while (octets-- > 0) to.push_back(uint8_t(number >> 8 * octets));
}
inline Octets operator+(Octets one, const Octets& more) {
    one.insert(one.end(), more.begin(), more.end());
    return one;
}

// A record in the clear.
inline Octets plain_record(uint8_t type, const Octets& content) {
    Octets out{type, 3, 3};
    put(out, content.size(), 2);
    return out + content;
}
inline Octets handshake_message(uint8_t type, const Octets& body) {
    Octets out{type};
    put(out, body.size(), 3);
    return out + body;
}

inline Octets hmac(const Octets& key, const Octets& message) {
    Octets out(32);
    HMAC(EVP_sha256(), key.data(), int(key.size()), message.data(), message.size(), out.data(),
         nullptr);
    return out;
}
// HKDF-Expand-Label of an empty context, RFC 8446 7.1. At most 32 octets.
inline Octets expand(const Octets& secret, const std::string& label, int length) {
    Octets info;
    put(info, uint64_t(length), 2);
    put(info, 6 + label.size(), 1);
    const std::string whole = "tls13 " + label;
    info.insert(info.end(), whole.begin(), whole.end());
    info.insert(info.end(), {0, 1});  // no context; the first block
    Octets out = hmac(secret, info);
    out.resize(size_t(length));
    return out;
}
// TLS 1.2's PRF, RFC 5246 5.
inline Octets prf(const Octets& secret, const std::string& label, const Octets& seed,
                  size_t length) {
    const Octets whole = Octets(label.begin(), label.end()) + seed;
    Octets out, a = whole;
    while (out.size() < length) {
        a = hmac(secret, a);
        out = out + hmac(secret, a + whole);
    }
    out.resize(length);
    return out;
}

// This end's records, of a connection with AES_128_GCM and SHA256.
class Records {
public:
    // Of each context, when it is made.
    static void watch(SSL_CTX* ctx) { SSL_CTX_set_keylog_callback(ctx, on_secret); }
    // Before the handshake: what must be so that the keys can be derived.
    static void prepare(SSL* ssl) {
        SSL_set_app_data(ssl, &secrets());  // any that is not null: its secret is kept
        SSL_set_ciphersuites(ssl, "TLS_AES_128_GCM_SHA256");
        SSL_set_cipher_list(ssl, "ECDHE-ECDSA-AES128-GCM-SHA256");
        SSL_set_num_tickets(ssl, 0);  // they would be records of unknown number
    }
    // After the handshake, if nothing else was sent.
    explicit Records(SSL* ssl) : tls13_(SSL_version(ssl) >= TLS1_3_VERSION) {
        if (tls13_) {
            secret_ = secret_of(ssl);
            number_ = 0;
            derive();
            return;
        }
        Octets master(SSL_MAX_MASTER_KEY_LENGTH), seed(64);
        master.resize(
            SSL_SESSION_get_master_key(SSL_get_session(ssl), master.data(), master.size()));
        SSL_get_server_random(ssl, seed.data(), 32);
        SSL_get_client_random(ssl, seed.data() + 32, 32);
        const Octets block = prf(master, "key expansion", seed, 40);  // RFC 5246 6.3
        key_.assign(block.begin() + 16, block.begin() + 32);
        iv_.assign(block.begin() + 36, block.end());
        number_ = 1;  // 0 was Finished
    }

    Octets seal(uint8_t type, const Octets& content) {
        Octets inner = content, nonce = iv_, head, explicit_nonce;
        if (tls13_) {  // RFC 8446 5.2, 5.3
            inner.push_back(type);
            for (int i = 0; i < 8; i++) nonce[size_t(11 - i)] ^= uint8_t(number_ >> 8 * i);
            head = {ApplicationData, 3, 3};
            put(head, inner.size() + 16, 2);
        } else {  // RFC 5288 3
            put(explicit_nonce, number_, 8);
            nonce = nonce + explicit_nonce;
            put(head, number_, 8);
            head = head + Octets{type, 3, 3};
            put(head, inner.size(), 2);
        }
        number_++;
        const Octets sealed = encrypt(nonce, head, inner);
        if (tls13_) return head + sealed;
        Octets out{type, 3, 3};
        put(out, 8 + sealed.size(), 2);
        return out + explicit_nonce + sealed;
    }

    // TLS 1.3: what follows is under the next key, RFC 8446 7.2.
    Octets update_key(bool requested) {
        const Octets out = seal(Handshake, handshake_message(KeyUpdate, {uint8_t(requested)}));
        secret_ = expand(secret_, "traffic upd", 32);
        derive();
        return out;
    }
    // TLS 1.3: a ticket that is good for nothing, but looks as others do. RFC 8446 4.6.1.
    Octets ticket() {
        Octets body;
        put(body, 7200, 4);
        put(body, number_, 4);  // ticket_age_add
        body.push_back(8);
        put(body, number_, 8);  // the nonce, another for each
        put(body, 160, 2);
        body.insert(body.end(), 160, uint8_t(number_));
        put(body, 0, 2);
        return seal(Handshake, handshake_message(NewSessionTicket, body));
    }

private:
    static std::map<const SSL*, Octets>& secrets() {
        static std::map<const SSL*, Octets> all;
        return all;
    }
    static std::mutex& guard() {  // of the secrets
        static std::mutex one;
        return one;
    }
    static void on_secret(const SSL* ssl, const char* line) {
        std::string words(line);
        if (!SSL_get_app_data(ssl) || words.rfind("SERVER_TRAFFIC_SECRET_0 ", 0) != 0) return;
        const std::string hex = words.substr(words.rfind(' ') + 1);
        Octets secret;
        for (size_t i = 0; i + 1 < hex.size(); i += 2)
            secret.push_back(uint8_t(std::stoi(hex.substr(i, 2), nullptr, 16)));
        std::lock_guard lock(guard());
        secrets()[ssl] = secret;
    }
    static Octets secret_of(const SSL* ssl) {
        std::lock_guard lock(guard());
        Octets found = secrets()[ssl];
        secrets().erase(ssl);
        return found;
    }
    void derive() {
        key_ = expand(secret_, "key", 16);
        iv_ = expand(secret_, "iv", 12);
        number_ = 0;
    }
    Octets encrypt(const Octets& nonce, const Octets& aad, const Octets& inner) const {
        Octets out(inner.size() + 16);
        int size = 0;
        EVP_CIPHER_CTX* ctx = EVP_CIPHER_CTX_new();
        EVP_EncryptInit_ex(ctx, EVP_aes_128_gcm(), nullptr, key_.data(), nonce.data());
        EVP_EncryptUpdate(ctx, nullptr, &size, aad.data(), int(aad.size()));
        EVP_EncryptUpdate(ctx, out.data(), &size, inner.data(), int(inner.size()));
        EVP_EncryptFinal_ex(ctx, out.data() + inner.size(), &size);
        EVP_CIPHER_CTX_ctrl(ctx, EVP_CTRL_GCM_GET_TAG, 16, out.data() + inner.size());
        EVP_CIPHER_CTX_free(ctx);
        return out;
    }

    const bool tls13_;
    Octets secret_, key_, iv_;
    uint64_t number_ = 0;
};

}  // namespace test
